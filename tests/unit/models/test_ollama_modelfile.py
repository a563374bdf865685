"""Models as code, as tables: the request to Ollama, the equivalent Modelfile, and the problems."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.models.ollama.modelfile import (
    ModelRecipe,
    invisible,
    looks_like_path,
    modelfile_problems,
    quantize_problems,
    recipe,
    source_problems,
    split_of,
)

PLACE = Path(
    "/Volumes/BOWIE/_MODELS/HIGHERMIND models ready to use/tsc-ulysses-by-james-joyce@f16/TSC-ULYSSES_f16.gguf"
)


def made(**changes: Any) -> ModelRecipe:
    values = {"name": "ulysses", "served_as": "tsc-ulysses:q8_0", "source": str(PLACE), **changes}
    return recipe(values.pop("name"), values.pop("served_as"), **values)


def test_recipe_request_complete() -> None:
    modelfile = {
        "template": "{{ .Prompt }}", "system": "You are\nMolly.", "license": "MIT",
        "parameters": {"temperature": 0.7, "num_ctx": 4096, "stop": "</s>"},
        "messages": [{"role": "user", "content": "yes?"}], "renderer": "x", "parser": "y", "requires": "0.24.0",
    }  # fmt: skip
    one = made(quantize="q8_0", modelfile=modelfile)
    assert one.request({PLACE: "sha256:ab"}, {PLACE: "0.gguf"}) == {
        "model": "tsc-ulysses:q8_0", "files": {"0.gguf": "sha256:ab"}, "quantize": "Q8_0", "template": "{{ .Prompt }}",
        "system": "You are\nMolly.", "license": ["MIT"],
        "parameters": {"num_ctx": 4096, "stop": ["</s>"], "temperature": 0.7},
        "messages": [{"role": "user", "content": "yes?"}], "renderer": "x", "parser": "y", "requires": "0.24.0",
    }  # fmt: skip


def test_recipe_render_complete() -> None:
    modelfile = {
        "system": "You are\nMolly.",
        "parameters": {"temperature": 0.7, "stop": ["</s>", " x "], "use_mmap": False},
        "adapter": "/a/lora.gguf",
    }
    assert made(quantize="q8_0", modelfile=modelfile).render() == (
        "# ollama create --quantize Q8_0 tsc-ulysses:q8_0\n"
        f"FROM {PLACE}\n"
        "ADAPTER /a/lora.gguf\n"
        'SYSTEM """You are\nMolly."""\n'
        "PARAMETER stop </s>\n"
        'PARAMETER stop " x "\n'
        "PARAMETER temperature 0.7\n"
        "PARAMETER use_mmap false\n"
    )


@pytest.mark.parametrize(
    ("source", "path"),
    [
        ("/a/b.gguf", True),
        ("./b.gguf", True),
        ("../b", True),
        ("~/b", True),
        ("models/b.gguf", True),
        ("b.GGUF", True),
        ("llama3.2", False),
        ("hf.co/me/x:q4", False),
        ("me/x", False),
    ],
)
def test_looks_like_path(source: str, path: bool) -> None:
    assert looks_like_path(source) is path
    one = made(source=source)
    assert (one.source is not None, one.base is None) == (path, path)


def test_recipe_relative_paths_start_at_config_folder(tmp_path: Path) -> None:
    one = made(source="x/y.gguf", config_dir=tmp_path, modelfile={"projector": "p.gguf"})
    assert one.source == tmp_path / "x" / "y.gguf"
    assert one.projector == tmp_path / "p.gguf"


def test_absolute_unknown_home_is_a_plain_folder(tmp_path: Path) -> None:
    one = made(source="~nouser/y.gguf", config_dir=tmp_path, modelfile={"adapter": "~nouser/a"})
    assert one.source == tmp_path / "~nouser" / "y.gguf"
    assert one.adapters == (tmp_path / "~nouser" / "a",)


@pytest.mark.parametrize(
    ("source", "text"),
    [
        ("", "must name a file"),
        ("  ", "must name a file"),
        ("a@sha256:00", "digest"),
        ("a b", "starts with '/'"),
        ("a/b/c/d", "at most"),
        ("/x/m-00001-of-00003.gguf", "one of 3 shards"),
        ("/x\ny.gguf", "one line"),
    ],
)
def test_source_problems(source: str, text: str) -> None:
    assert text in source_problems(source)[0]
    with pytest.raises(ValueError, match=r"models\.ulysses\.from"):
        made(source=source)


@pytest.mark.parametrize(
    ("modelfile", "path", "text"),
    [
        ({"form": "x"}, ("modelfile", "form"), "a modelfile takes"),
        ({"template": 1}, ("modelfile", "template"), "a string"),
        ({"parameters": []}, ("modelfile", "parameters"), "a mapping"),
        ({"parameters": {"temprature": 1}}, ("modelfile", "parameters", "temprature"), "not a parameter of Ollama"),
        ({"parameters": {"num_ctx": 1.5}}, ("modelfile", "parameters", "num_ctx"), "whole number"),
        ({"parameters": {"num_ctx": True}}, ("modelfile", "parameters", "num_ctx"), "whole number"),
        ({"parameters": {"temperature": "hot"}}, ("modelfile", "parameters", "temperature"), "a number"),
        ({"parameters": {"temperature": float("nan")}}, ("modelfile", "parameters", "temperature"), "a number"),
        ({"parameters": {"use_mmap": 1}}, ("modelfile", "parameters", "use_mmap"), "true or false"),
        ({"parameters": {"stop": [1]}}, ("modelfile", "parameters", "stop"), "list of strings"),
        ({"messages": "hi"}, ("modelfile", "messages"), "a list of"),
        ({"messages": [{"role": "tool", "content": ""}]}, ("modelfile", "messages", 0), "role must be"),
        ({"messages": [{"role": "user"}]}, ("modelfile", "messages", 0), "{role, content}"),
        ({"license": 3}, ("modelfile", "license"), "list of strings"),
        ({"adapters": "x"}, ("modelfile", "adapters"), "list of strings"),
        ({"requires": "new"}, ("modelfile", "requires"), "not a version"),
    ],
)
def test_modelfile_problems(modelfile: Mapping[str, Any], path: tuple[str | int, ...], text: str) -> None:
    found = modelfile_problems(modelfile)
    assert [place for place, _ in found] == [path]
    assert text in found[0][1]


def test_modelfile_problems_all_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        made(source="a@b", quantize="q9", modelfile={"x": 1, "parameters": {"y": 2}})
    assert len(str(caught.value).splitlines()) == 4


def test_quantize_problems() -> None:
    for kind in ("q4_K_m", "Q4_K_S", "q8_0", "f16", "F32"):
        assert quantize_problems(kind) == []
    for kind in ("q3", "Q4_0", "Q5_K_M", "Q6_K", "BF16"):  # Ollama reads files of these kinds, but creates none
        [(path, message)] = quantize_problems(kind)
        assert path == ("quantize",)
        assert message.endswith("that Ollama creates: F32, F16, Q8_0, Q4_K_M, Q4_K_S")


@pytest.mark.parametrize(
    ("name", "shards"),
    [("m-00001-of-00004.gguf", 4), ("m.gguf", 1), ("m-1-of-4.gguf", 1), ("m-00001-of-00001.gguf", 1)],
)
def test_split_of_counts_by_name(name: str, shards: int) -> None:
    assert split_of(Path("/x") / name) == shards


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("/a b/@[x]#'(1)'.gguf", None),
        ("/a\u00a0b", "U+00A0 NO-BREAK SPACE"),
        ("/a\u202fb", "U+202F NARROW NO-BREAK SPACE"),
        ("/a\u200db", "U+200D ZERO WIDTH JOINER"),
        ("/a\tb", "U+0009 control character"),
        ("/ä/é/日本", None),
    ],
)
def test_invisible_finds_first_character(text: str, found: str | None) -> None:
    described = invisible(text)
    assert described is None if found is None else found in (described or "")


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"source": "/a\u00a0b.gguf"}, "drops; rename"),
        ({"source": "/a/b .gguf "}, "cuts spaces"),
        ({"modelfile": {"system": 'a """ b'}}, "no escape"),
        ({"modelfile": {"system": "a\u200bb"}}, "drops it"),
        ({"modelfile": {"system": 'say\n"x"'}}, "ends in a quotation mark"),
    ],
)
def test_recipe_render_inexpressible_raises(changes: Mapping[str, Any], text: str) -> None:
    one = made(**changes) if "source" not in changes or looks_like_path(changes["source"]) else None
    assert one is not None
    with pytest.raises(ValueError, match=text):
        one.render()
    assert one.request({})["model"] == "tsc-ulysses:q8_0"  # the request can express it


def read_value(text: str) -> str:
    """Parse a value as Ollama does: quotes at both ends are removed, outer space of an unquoted value is cut."""
    if text.startswith('"""'):
        return text[3:].removesuffix('"""')
    return text[1:-1] if text.startswith('"') else text.strip()


@given(st.text(alphabet="ab \"\n#@'é", max_size=12))
def test_recipe_render_reads_back(system: str) -> None:
    if not system:
        return
    try:
        lines = made(modelfile={"system": system}).render()
    except ValueError:
        assert '"""' in system or system.endswith('"')
        return
    value = lines.split("\nSYSTEM ", 1)[1].removesuffix("\n")
    assert read_value(value) == system


@given(st.dictionaries(st.sampled_from(["template", "system", "renderer"]), st.text(min_size=1, max_size=5)))
def test_recipe_hash_covers_request_and_files(modelfile: dict[str, str]) -> None:
    prints = {"/a": "11"}
    one, same = made(modelfile=modelfile), made(modelfile=dict(reversed(modelfile.items())))
    assert one.content_hash(prints) == same.content_hash(prints)
    assert one.content_hash(prints) == made(modelfile=modelfile, source="/moved.gguf").content_hash({"/b": "11"})
    assert one.content_hash(prints) != one.content_hash({"/a": "12"})
    assert one.content_hash(prints) != made(modelfile={**modelfile, "parser": "p"}).content_hash(prints)
    assert one.content_hash(prints) != made(modelfile=modelfile, quantize="q8_0").content_hash(prints)
