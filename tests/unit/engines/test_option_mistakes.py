"""Try wrong and valid values of every option of every engine, through the checks that `fleetd check` runs.

The values are derived from the types of the options: a new option needs no line here, and a new *type* without a row fails.
Valid values are tried too, to show that the wrong ones fail for their value.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import pytest
import yaml

from fleetd.config.schema import types as config_fields
from fleetd.config.schema.types import FieldType
from fleetd.engines import option_types as engine_fields
from fleetd.engines import registry
from fleetd.engines.lmstudio.options import LOAD_OPTIONS
from fleetd.engines.ollama.options import LOAD_TIME_OPTIONS
from fleetd.engines.vllm.options import LengthType
from fleetd.errors import ConfigError, Problem
from fleetd.resolver.check import load_and_resolve

NUL, LONG_NAME, NO_HOME = "a\0b", "x" * 300, "~nobody-of-this-name/m.gguf"
SECRET = "sk-hidden 4711"  # the space makes it invalid
ENTRIES: Mapping[str, Mapping[str, Any]] = {
    "external": {"external": "http://127.0.0.1:9"},
    "llamacpp": {},
    "lmstudio": {},
    "ollama": {},
    "process": {"command": ["/bin/server"]},
    "vllm": {},
}
REQUIRED: Mapping[str, Mapping[str, Any]] = {"llamacpp": {"model": "/absent.gguf"}, "vllm": {"model": "org/model"}}
OWN_PROCESS = ("llamacpp", "process", "vllm")
# other keys that a value needs to be valid
COMPANIONS: Mapping[tuple[str, str], Mapping[str, Any]] = {
    ("llamacpp", "gpu_layers"): {"device": "gpu0"},
    ("llamacpp", "main_gpu"): {"device": "gpu0"},
    ("llamacpp", "tensor_split"): {"device": "gpu0"},
    ("ollama", "api_key"): {"external": "http://127.0.0.1:9"},
    ("vllm", "enable_sleep_mode"): {"device": "gpu0"},
    ("vllm", "sleep_level"): {"device": "gpu0", "options": {"enable_sleep_mode": True}},
    ("vllm", "enable_auto_tool_choice"): {"options": {"tool_call_parser": "hermes"}},
    ("vllm", "lora_modules"): {"options": {"enable_lora": True}},
    ("llamacpp", "ubatch"): {"options": {"batch": 2**31 - 1}},
}
LORA_WRONG = ["a.gguf", 5, {"path": "a"}, [5], [""], [NUL], [{"scale": 2}], [{"path": "a", "scale": "big"}],
              [{"path": "a", "size": 1}], [{"path": NUL}], [True]]  # fmt: skip
LORA_RIGHT = [[], ["a.gguf"], [{"path": "a.gguf", "scale": 0.5}], ["a.gguf", "a.gguf"]]
NOT_TEXT = [5, 1.5, True, [], ["a"], {}, {"a": 1}, "", NUL]


@dataclass(frozen=True)
class Option:
    """One field of one engine's options."""

    engine: str
    field: str

    def __str__(self) -> str:
        return f"{self.engine}.{self.field}"


OPTIONS = [Option(name, field) for name in registry.names() for field in registry.load(name).options.model_fields]


def kind_of(option: Option) -> FieldType | None:
    """Return the type object of a field; None: it is not a type of fleetd."""
    info = registry.load(option.engine).options.model_fields[option.field]
    found = [one for one in info.metadata if isinstance(one, FieldType)]
    return found[0] if found else next(_kinds(info.annotation), None)


def _kinds(annotation: Any) -> Iterator[FieldType]:
    if get_origin(annotation) is Annotated:
        yield from (one for one in get_args(annotation)[1:] if isinstance(one, FieldType))
        return
    for part in get_args(annotation):
        yield from _kinds(part)


def wrong(kind: FieldType | None, option: Option) -> list[Any]:
    """Return values that this field must reject. A type without a row fails."""
    if option == Option("llamacpp", "lora"):
        return LORA_WRONG
    numbers = ["nonsense", "", NUL, True, [], [1], {}, {"a": 1}, float("inf"), float("nan"), 10**30]
    match kind:
        case config_fields.Whole():
            return [*numbers, 1.5, "1.5", kind.minimum - 1, kind.maximum + 1, -(10**30)]
        case config_fields.Real():
            return [*numbers, kind.minimum - 0.5, kind.maximum * 2]
        case config_fields.Flag():
            return ["yes", "on", "nonsense", "", NUL, 0, 1, 2, 1.0, [], [True], {}]
        case engine_fields.LifetimeType():
            return ["nonsense", "", NUL, True, 5, -2, "5", "-5m", "1w", [], {}, float("inf")]
        case config_fields.DurationType():
            return ["nonsense", "", NUL, True, 5, -1, "5", "-5m", "1w", "forever", [], {}, float("inf")]
        case config_fields.Size():
            return ["nonsense", "", NUL, True, -1, 1.5, "10G", "5%", "-1GiB", [], {}, 10**30, float("nan")]
        case engine_fields.ApiType() | config_fields.Choice():
            return ["nonsense", "", NUL, 5, True, [], [kind.choices[0]], {}, kind.choices[0].upper() + "x"]
        case engine_fields.SecretType():
            return [12345, True, [], {}, "", NUL, "line\nbreak", SECRET, "schlüssel", "x" * 5000]
        case engine_fields.AnyOf():
            return ["nonsense", "", NUL, -7, 1.5, [], {}, 10**30]
        case engine_fields.PathType():
            return [*NOT_TEXT, f"/{LONG_NAME}/m.gguf", "x/" * 3000]
        case config_fields.Text():
            return [*NOT_TEXT, "x" * (kind.longest + 1), *(["nonsense"] if kind.pattern is not None else [])]
        case config_fields.Arguments():
            return [5, True, {}, {"a": 1}, [5], [["a"]], [NUL], "an open 'quote"]
        case config_fields.Strings():
            return [5, {}, "", [5], [""], [NUL], ["a", "a"], [["a"]], *([[]] if kind.at_least else [])]
        case engine_fields.Several():
            return ["nonsense", 5, {}, ["nonsense"], [-1], [True], [[1]], [float("inf")]]
        case engine_fields.ArgumentsType():
            return ["nonsense", 5, [], ["a"], {"": 1}, {"a b": 1}, {"a": NUL}, {"a": [[1]]}, {"a": float("nan")}]
        case engine_fields.JsonType():
            return ["nonsense", 5, [], ["a"], {"a": NUL}, {"a": float("inf")}, {"a": {"b": [float("nan")]}}]
        case LengthType():
            return ["nonsense", "", NUL, True, 0, -2, 1.5, "0", "8x", 10**30, [], {}]
    raise AssertionError(f"{option}: no wrong values are known for the type {kind}")


def right(kind: FieldType | None, option: Option) -> list[Any]:
    """Return values that this field must accept."""
    if option == Option("llamacpp", "lora"):
        return LORA_RIGHT
    match kind:
        case config_fields.Whole():
            return [kind.maximum, str(kind.maximum), 4.0 if kind.minimum <= 4 <= kind.maximum else kind.minimum]
        case config_fields.Real():
            return [kind.maximum, str(kind.maximum)]
        case config_fields.Flag():
            return [True, "true"]
        case engine_fields.LifetimeType():
            return [-1, "-1", "forever", "5m", 0]
        case config_fields.DurationType():
            return ["5m", 0, "1h30m"]
        case config_fields.Size():
            return ["2GiB", 2**30, "1073741824"]
        case engine_fields.ApiType() | config_fields.Choice():
            return [one for one in kind.choices if (option.engine, one) != ("external", "none")]
        case engine_fields.SecretType():
            return ["sk-1234", "12345"]
        case engine_fields.AnyOf():
            return [True] if "debug" in option.field else ["auto"]
        case engine_fields.PathType():
            return ["/absent/m.gguf", NO_HOME, "~/m.gguf", "a b/m.gguf"]
        case config_fields.Text():
            shaped = {"health": "/health", "hsa_override_gfx_version": "10.3.0"}
            return [shaped.get(option.field, "fp8")]
        case config_fields.Arguments():
            return [[], ["--temp", "0.5"], "--temp 0.5"]
        case config_fields.Strings():
            return [["a", "b"], "a"]
        case engine_fields.Several():
            return [[1, 2], [1, 1]]
        case engine_fields.ArgumentsType():
            return [{}, {"some-flag": True, "other": [1, "a"], "third": {"a": 1}, "fourth": None}]
        case engine_fields.JsonType():
            return [{}, {"a": 1, "b": [None, {"c": "d"}]}]
        case LengthType():
            return [8192, "8K", "auto", -1, "1.5k"]
    raise AssertionError(f"{option}: no valid values for the type {kind}")


def entry(engine: str, options: Mapping[str, Any], more: Mapping[str, Any]) -> dict[str, Any]:
    companions = dict(more.get("options", {}))
    rest = {key: value for key, value in more.items() if key != "options"}
    given = {**REQUIRED.get(engine, {}), **companions, **options}
    return {"engine": engine, **ENTRIES[engine], **rest, "options": given}


def problems(folder: Path, section: str, entries: Mapping[str, Any]) -> list[Problem]:
    """Write a fleet and return the problems that `fleetd check` reports."""
    return problems_of(write(folder, {section: dict(entries)}))


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    where = {key: str(folder / key) for key in ("state", "run", "logs")}
    file = folder / "fleet.yaml"
    file.write_text(yaml.dump({"paths": where, **content}, Dumper=yaml.CSafeDumper), "utf-8")
    return file


def problems_of(file: Path) -> list[Problem]:
    folder = file.parent
    try:
        load_and_resolve(file, {"HOME": str(folder), "PATH": "/nowhere"})
    except ConfigError as error:
        return list(error.problems)
    return []


def sections(engine: str) -> tuple[str, ...]:
    return ("instances", "models") if engine in OWN_PROCESS else ("instances",)


def sensible(problem: Problem) -> bool:
    """Return whether a user can act on the message."""
    text = problem.message
    jargon = ("Input should", "Value error", "Traceback", "pydantic", "NoneType", "<class", "validation error", "tuple")
    return len(text) > 8 and "\n" not in text and len(text) < 600 and not any(word in text for word in jargon)


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_wrong_value_is_reported_at_its_key(option: Option, tmp_path: Path) -> None:
    values = wrong(kind_of(option), option)
    for section in sections(option.engine):
        more = COMPANIONS.get((option.engine, option.field), {})
        named = {f"e{index}": entry(option.engine, {option.field: value}, more) for index, value in enumerate(values)}
        found = problems(tmp_path, section, named)
        for name, value in zip(named, values, strict=True):
            start = f"{section}.{name}.options.{option.field}"
            own = [one for one in found if one.path == start or one.path.startswith((f"{start}.", f"{start}["))]
            assert len(own) == 1, (option, value, own or "accepted")
            assert own[0].line > 0
            assert own[0].file.endswith("fleet.yaml")
            assert sensible(own[0]), (value, own[0].message)
            assert SECRET not in own[0].message
        stray = [one for one in found if not one.path.startswith(tuple(f"{section}.{name}." for name in named))]
        assert not stray
        assert len(found) == len(values), [one for one in found if f".options.{option.field}" not in one.path]


@pytest.mark.parametrize("option", OPTIONS, ids=str)
def test_option_valid_value_is_accepted(option: Option, tmp_path: Path) -> None:
    values = right(kind_of(option), option)
    more = COMPANIONS.get((option.engine, option.field), {})
    for section in sections(option.engine):
        named = {f"e{index}": entry(option.engine, {option.field: value}, more) for index, value in enumerate(values)}
        assert problems(tmp_path, section, named) == []


@pytest.mark.parametrize("name", registry.names())
def test_option_unknown_name_is_reported_with_nearest(name: str, tmp_path: Path) -> None:
    fields = list(registry.load(name).options.model_fields)
    for section in sections(name):
        wanted = {
            "near": {fields[0] + "x": 1},
            "far": {"zzz": 1},
            "two": {"zzz": 1, "yyy": None, fields[-1]: {"a": NUL}},
        }
        found = problems(tmp_path, section, {key: entry(name, options, {}) for key, options in wanted.items()})
        by_path = {one.path: one for one in found}
        assert f"did you mean {fields[0]}" in by_path[f"{section}.near.options.{fields[0]}x"].message
        assert by_path[f"{section}.far.options.zzz"].message.startswith("unknown option: ")
        assert {path.split(".options.")[1].split(".")[0] for path in by_path if ".two." in path} >= {"zzz", fields[-1]}
        assert all(one.line > 0 and sensible(one) for one in found)


@pytest.mark.parametrize("name", sorted(REQUIRED))
def test_required_option_missing_or_empty_is_reported(name: str, tmp_path: Path) -> None:
    for section in sections(name):
        entries = {"none": {"engine": name}, "empty": {"engine": name, "options": {"model": None}}}
        found = {one.path: one for one in problems(tmp_path, section, entries)}
        assert set(found) == {f"{section}.none.options.model", f"{section}.empty.options.model"}
        assert all(one.message == "is required" and one.line > 0 for one in found.values())


@pytest.mark.parametrize("options", [5, "text", ["a"], True], ids=str)
@pytest.mark.parametrize("name", registry.names())
def test_options_not_a_mapping_is_reported(name: str, options: Any, tmp_path: Path) -> None:
    found = problems(tmp_path, "instances", {"e": {"engine": name, **ENTRIES[name], "options": options}})
    assert [one.path for one in found] == ["instances.e.options"]
    assert sensible(found[0])


@pytest.mark.parametrize("name", ["vlm", "", 5, NUL, "Ollama", ["ollama"]], ids=repr)
def test_engine_unknown_name_is_reported(name: Any, tmp_path: Path) -> None:
    found = problems(tmp_path, "instances", {"e": {"engine": name}})
    assert [one.path for one in found] == ["instances.e.engine"]
    assert sensible(found[0])


def test_vllm_removed_option_is_reported_with_replacement(tmp_path: Path) -> None:
    refused = registry.load("vllm").options.refused
    found = problems(tmp_path, "models", {"e": entry("vllm", dict.fromkeys(refused, 1), {})})
    assert {one.path: one.message for one in found} == {
        f"models.e.options.{key}": reason for key, reason in refused.items()
    }


# -- missing files ------------------------------------------------------------------------------------------------------

# engine → options that name files, and the keys that name them
FILES: Mapping[str, tuple[Mapping[str, Any], Mapping[str, str]]] = {
    "llamacpp": (
        {
            "model": "DIR/model.gguf",
            "mmproj": "DIR/projector.gguf",
            "lora": ["DIR/a.gguf", {"path": "DIR/b.gguf", "scale": 0.5}],
            "chat_template_file": "./DIR/template.jinja",
        },
        {
            "model": "model.gguf",
            "mmproj": "projector.gguf",
            "lora[0]": "a.gguf",
            "lora[1]": "b.gguf",
            "chat_template_file": "template.jinja",
        },
    ),
    "ollama": ({"models_dir": "DIR/store"}, {"models_dir": "store"}),
    "vllm": (
        {
            "model": "./DIR/weights",
            "tokenizer": "./DIR/tokenizer",
            "chat_template": "./DIR/template.jinja",
            "generation_config": "./DIR/generation",
            "enable_lora": True,
            "lora_modules": ["one=./DIR/lora"],
            "speculative_config": {"model": "./DIR/draft", "num_speculative_tokens": 3},
            "gpu_memory_utilization": 0.5,
        },
        {
            "model": "weights",
            "tokenizer": "tokenizer",
            "chat_template": "template.jinja",
            "generation_config": "generation",
            "lora_modules[0]": "lora",
            "speculative_config.model": "draft",
        },
    ),
}
NO_FILES = {"external", "lmstudio", "process"}


def placed(value: Any, folder: str) -> Any:
    if isinstance(value, dict):
        return {key: placed(item, folder) for key, item in value.items()}
    if isinstance(value, list):
        return [placed(item, folder) for item in value]
    return value.replace("DIR", folder) if isinstance(value, str) else value


def test_every_engine_has_its_file_options_listed() -> None:
    assert {*FILES, *NO_FILES} == set(registry.names())


@pytest.mark.parametrize("name", sorted(FILES))
def test_missing_file_warns_at_its_key_and_blocks(name: str, tmp_path: Path) -> None:
    options, named = FILES[name]
    program = tmp_path / "program"
    keys = {"command": [str(program)], "options": placed(dict(options), "files")}
    for section in sections(name):
        file = write(tmp_path, {section: {"e": {"engine": name, **keys}}})
        resolved = load_and_resolve(file, {"HOME": str(tmp_path)})[1]
        wanted = {str(tmp_path / "files" / file_name): f"{section}.e.options.{key}" for key, file_name in named.items()}
        assert resolved.plans["e"].required_by == wanted
        assert set(wanted) <= set(resolved.plans["e"].requires)
        missing = {one.path: one for one in resolved.warnings if "is missing: " in one.message}
        assert {one.message.split(" is missing: ")[0]: path for path, one in missing.items()} == wanted
        assert all(one.line > 0 and "BLOCKED" in one.message and sensible(one) for one in missing.values())
        words = [*resolved.plans["e"].launch.argv, *resolved.plans["e"].launch.env.values()]
        assert all(any(path in word for word in words) for path in wanted), words
    for file_name in named.values():
        (tmp_path / "files" / file_name).mkdir(parents=True)
    if name == "llamacpp":
        (tmp_path / "files" / "model.gguf").rmdir()
        (tmp_path / "files" / "model.gguf").write_bytes(b"")
    resolved = load_and_resolve(file, {"HOME": str(tmp_path)})[1]
    assert [one for one in resolved.warnings if "is missing: " in one.message] == []


@pytest.mark.parametrize("template", ["{{ messages }}", "/{% if x %}\n{{ y }}", "chatml"])
def test_template_given_as_text_is_not_a_file(template: str, tmp_path: Path) -> None:
    entries = {"e": {"engine": "vllm", "options": {"model": "org/model", "chat_template": template}}}
    resolved = load_and_resolve(write(tmp_path, {"models": entries}), {"PATH": "/nowhere"})[1]
    assert resolved.plans["e"].required_by == {}


# -- models of a server -------------------------------------------------------------------------------------------------

HELD: Mapping[str, Mapping[str, FieldType]] = {"ollama": LOAD_TIME_OPTIONS, "lmstudio": LOAD_OPTIONS}


def held(folder: Path, engine: str, models: Mapping[str, Any]) -> list[Problem]:
    """Return the problems of models that the instance `it` serves."""
    entries = {name: {"instance": ["it"], **keys} for name, keys in models.items()}
    return problems_of(write(folder, {"instances": {"it": entry(engine, {}, {})}, "models": entries}))


@pytest.mark.parametrize("name", registry.names())
def test_load_option_wrong_value_is_reported_at_the_model(name: str, tmp_path: Path) -> None:
    known = HELD.get(name, {})
    wanted = {f"u{index}": {"options": {key: 1}} for index, key in enumerate(("zzz", "temperature", ""))}
    for key, kind in known.items():
        option = Option(name, key)
        wanted |= {f"{key}.{index}": {"options": {key: value}} for index, value in enumerate(wrong(kind, option))}
    for model, keys in wanted.items():
        [key] = keys["options"]
        found = held(tmp_path, name, {model: keys})
        assert [one.path for one in found] == [f"models.{model}.options.{key or chr(34) * 2}"], (keys, found)
        assert found[0].line > 0
        assert sensible(found[0])
    made = (
        {"from": "base"} if name == "ollama" else {}
    )  # without a source a model is not built, and cannot keep options
    fine = {f"{key}.{index}": {"options": {key: value}, **made} for key, kind in known.items()
            for index, value in enumerate(right(kind, Option(name, key)))}  # fmt: skip
    assert held(tmp_path, name, {"plain": {}, **fine} if name in HELD else {"plain": {}}) == []


def test_load_option_of_model_not_built_is_rejected_with_fix(tmp_path: Path) -> None:
    [found] = held(tmp_path, "ollama", {"hand": {"served_as": "llama:1b", "options": {"num_ctx": 2048}}})
    assert found.path == "models.hand.options"
    assert "from: llama:1b, served_as: llama:1b-own" in found.message
    keys = {"from": "llama:1b", "served_as": "llama:1b-own", "options": {"num_ctx": 2048}}
    assert held(tmp_path, "ollama", {"hand": keys}) == []
    [found] = held(tmp_path, "ollama", {"hand": {"from": "hand:latest"}})
    assert (found.path, "names the model itself" in found.message) == ("models.hand.from", True)


@pytest.mark.parametrize("name", [name for name in registry.names() if name != "ollama"])
def test_build_keys_of_other_engines_are_rejected(name: str, tmp_path: Path) -> None:
    found = held(tmp_path, name, {"m": {"from": "/m.gguf", "quantize": "q8_0", "modelfile": {"system": "Hello."}}})
    assert {one.path for one in found} == {"models.m.quantize", "models.m.modelfile"}
    assert all("does not build models" in one.message and one.line > 0 for one in found)


@pytest.mark.parametrize(
    ("keys", "path"),
    [
        ({"from": "/m.gguf", "quantize": "q9"}, "quantize"),
        ({"quantize": "q8_0"}, "from"),
        ({"from": "/m.gguf", "modelfile": {"parameters": {"temprature": 1}}}, "modelfile.parameters.temprature"),
        ({"from": "/m.gguf", "modelfile": {"parameters": {"num_ctx": "many"}}}, "modelfile.parameters.num_ctx"),
        ({"from": "/m-00001-of-00002.gguf"}, "from"),
        ({"from": "/m.gguf", "quantize": "q4_0"}, "quantize"),
        (
            {"from": "/m", "options": {"num_ctx": 1024}, "modelfile": {"parameters": {"num_ctx": 2048}}},
            "options.num_ctx",
        ),
        ({"served_as": "a@b"}, "served_as"),
        ({"served_as": "a:cloud"}, "served_as"),
    ],
    ids=repr,
)
def test_ollama_invalid_build_keys_are_reported_at_the_model(
    keys: Mapping[str, Any], path: str, tmp_path: Path
) -> None:
    found = held(tmp_path, "ollama", {"m": keys})
    assert [one.path for one in found] == [f"models.m.{path}"]
    assert found[0].line > 0
    assert sensible(found[0])
