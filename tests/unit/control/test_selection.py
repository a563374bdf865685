"""Resolving what a user typed to names."""

from __future__ import annotations

import pytest

from fleetd.control import selection
from fleetd.control.port import Names
from fleetd.errors import ApiError

NAMES = Names(
    processes={"web": "web", "ollama-1": "ollama", "ollama-2": "ollama", "all-in": "all-in", "we[b]": "we[b]"},
    models={"ulysses": ("gpt",), "org/coder:7b": (), "coder": ()},
)


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["web"], ["web"]),
        (["all"], ["web", "ollama-1", "ollama-2", "all-in", "we[b]"]),
        (["ollama"], ["ollama-1", "ollama-2"]),
        (["*-1"], ["ollama-1"]),
        (["ollama-2", "ollama"], ["ollama-2", "ollama-1"]),
        (["we?"], ["web"]),
        (["we[b]"], ["we[b]"]),
        (["web", "web"], ["web"]),
    ],
)
def test_processes_patterns_select_names(patterns: list[str], expected: list[str]) -> None:
    assert selection.processes(patterns, NAMES) == expected


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [(["gpt"], ["ulysses"]), (["org/*"], ["org/coder:7b"]), (["*coder*"], ["org/coder:7b", "coder"])],
)
def test_models_patterns_select_names(patterns: list[str], expected: list[str]) -> None:
    assert selection.models(patterns, NAMES) == expected


def test_models_route_is_skipped_or_an_error_if_named() -> None:
    names = Names(models={"rt": ("chat",), "a": (), "b": ()}, routes={"rt": ("a", "b")})
    assert selection.models(["all"], names) == selection.models(["*"], names) == ["a", "b"]
    assert selection.models(["all"], Names(models={"rt": ()}, routes={"rt": ("a",)})) == []
    for pattern in ("rt", "chat", "r*"):
        with pytest.raises(ApiError, match=f"^{pattern[:1]}.* is a route: name its models .a, b.") as caught:
            selection.models(["a", pattern], names)
        assert (caught.value.status, caught.value.code) == (409, "is_a_route")


def test_all_of_empty_fleet_selects_nothing() -> None:
    assert selection.processes(["all"], Names()) == []


@pytest.mark.parametrize(
    ("patterns", "hint"),
    [
        (["webb"], "did you mean web?"),
        (["ulysses"], "fleetctl load ulysses"),
        (["zzzzz"], "known: all-in"),
        (["nothing*"], "known:"),
        (["web", "\x00"], "known:"),
        (["x" * 10_000], "known:"),
    ],
)
def test_processes_unknown_name_has_hint(patterns: list[str], hint: str) -> None:
    with pytest.raises(ApiError) as caught:
        selection.processes(patterns, NAMES)
    assert (caught.value.status, caught.value.code) == (404, "unknown_name")
    assert hint in (caught.value.hint or "")
    assert len(str(caught.value)) < 500


def test_models_process_name_has_hint() -> None:
    with pytest.raises(ApiError) as caught:
        selection.models(["ollama"], NAMES)
    assert "fleetctl start ollama" in (caught.value.hint or "")


def test_processes_no_pattern_is_invalid() -> None:
    with pytest.raises(ApiError) as caught:
        selection.models([], NAMES)
    assert caught.value.status == 400


ROUTED = Names(
    processes={"tick": "tick", "beta": "beta"},
    models={"any": (), "beta": (), "mate": ("m",)},
    routes={"any": ("beta", "mate")},
)


@pytest.mark.parametrize(
    ("verb", "word", "hint"),
    [
        ("stop", "any", "any is a route; its models are beta, mate"),
        ("stop", "mate", "fleetctl unload mate"),
        ("start", "mate", "fleetctl load mate"),
        ("restart", "m", "fleetctl unload m"),
        ("logs", "mate", "fleetctl status mate"),
        ("load", "tick", "fleetctl start tick"),
        ("unload", "tick", "fleetctl stop tick"),
    ],
)
def test_hint_for_other_kind_follows_the_verb(verb: str, word: str, hint: str) -> None:
    choose = selection.models if verb in ("load", "unload") else selection.processes
    with pytest.raises(ApiError) as caught:
        choose([word], ROUTED, verb)
    assert hint in (caught.value.hint or "")
