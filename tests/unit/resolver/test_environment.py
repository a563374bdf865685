"""The environment of a child, and redaction of secrets."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.resolver.environment import (
    HIDDEN,
    inherited,
    is_secret,
    parse_env_file,
    redacted_argv,
    redacted_env,
    substitute,
)


def test_inherited_drops_variables_for_the_daemon() -> None:
    parent = {
        "PATH": "/bin",
        "NOTIFY_SOCKET": "/run/x",
        "WATCHDOG_USEC": "1",
        "LISTEN_FDS": "1",
        "FLEETD_INSTANCE": "i",
        "HOME": "/",
    }
    assert inherited(parent) == {"PATH": "/bin", "HOME": "/"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("--port={port}", "--port=8080"),
        ("{host}:{port}/{name}/{replica}", "127.0.0.1:8080/web-2/2"),
        ("{other} {} {{port}}", "{other} {} {8080}"),
        ('{"json": 1}', '{"json": 1}'),
        ("plain", "plain"),
    ],
)
def test_substitute_replaces_placeholders(text: str, expected: str) -> None:
    assert substitute(text, {"port": 8080, "host": "127.0.0.1", "name": "web-2", "replica": 2}) == expected


def test_substitute_placeholder_without_value_stays() -> None:
    assert substitute("{port}", {"port": None, "name": "a"}) == "{port}"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A=1\nB = two words \n", {"A": "1", "B": "two words"}),
        ("# c\n\nexport A=1 # note\n", {"A": "1"}),
        ("A='$x \\n # kept'\n", {"A": "$x \\n # kept"}),
        ('A="a\\nb \\"q\\" \\$x"\n', {"A": 'a\nb "q" $x'}),
        ('A="one\ntwo"\nB=3', {"A": "one\ntwo", "B": "3"}),
        ("A=\n", {"A": ""}),
        ("\ufeffA=1\r\nB=2\r\n", {"A": "1", "B": "2"}),
        ("A=a=b#c\n", {"A": "a=b#c"}),
    ],
)
def test_parse_env_file_returns_variables(text: str, expected: dict[str, str]) -> None:
    assert parse_env_file(text) == (expected, [])


def test_parse_env_file_invalid_line_has_its_number() -> None:
    found, problems = parse_env_file("A=1\nwhat is this\n=x\nB='open\n")
    assert found == {"A": "1"}
    assert [line for line, _ in problems] == [2, 3, 4]


@given(st.text(max_size=200))
def test_parse_env_file_any_text_raises_nothing(text: str) -> None:
    found, problems = parse_env_file(text)
    assert all(isinstance(value, str) for value in found.values())
    assert all(line >= 1 for line, _ in problems)


@pytest.mark.parametrize(
    "name", ["API_KEY", "OPENAI_API_KEY", "HF_TOKEN", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY", "token"]
)
def test_is_secret_accepts_secret_names(name: str) -> None:
    assert is_secret(name)


@pytest.mark.parametrize(
    "name", ["PATH", "KEYBOARD", "MONKEY", "OLLAMA_NUM_PARALLEL", "TOKENIZERS_PARALLELISM", "AUTHOR"]
)
def test_is_secret_rejects_ordinary_names(name: str) -> None:
    assert not is_secret(name)


def test_redacted_env_and_argv_hide_secrets() -> None:
    assert redacted_env({"A": "1", "HF_TOKEN": "x", "P": "pw", "EMPTY_KEY": ""}, {"P"}) == {
        "A": "1",
        "HF_TOKEN": HIDDEN,
        "P": HIDDEN,
        "EMPTY_KEY": "",
    }
    assert redacted_env({"DB": "postgres://u:p@h/x"}) == {"DB": f"postgres://{HIDDEN}@h/x"}
    assert redacted_argv(["x", "--api-key", "abc", "--key=def", "--port", "1", "abc"], {"abc"}) == [
        "x", "--api-key", HIDDEN, f"--key={HIDDEN}", "--port", "1", HIDDEN,
    ]  # fmt: skip
