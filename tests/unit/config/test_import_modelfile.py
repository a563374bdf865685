"""Imports of Modelfiles: Ollama's grammar, the result, the report, and that the result loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fleetd.config.importers import ollama_parameters
from fleetd.config.importers.modelfile import is_modelfile, parse_modelfile
from fleetd.config.importers.ollama import import_ollama
from fleetd.config.schema.model import HeldModel
from fleetd.errors import ConfigError
from fleetd.models.ollama import modelfile as built
from tests.unit.config.test_import_models import loads, said

WHOLE = '''# the model of a ship
FROM ./hull.gguf
from mmproj.gguf
Parameter temperature 0.7
PARAMETER num_ctx 8192
PARAMETER stop "</s>"
PARAMETER stop "two words"
PARAMETER use_mmap false
PARAMETER mirostat 2
PARAMETER shape round
PARAMETER seed 1.5
TEMPLATE """{{ if .System }}{{ .System }}{{ end }}
{{ .Prompt }} costs $5 {port}"""
SYSTEM You are a ship.\t
ADAPTER ./one.gguf
ADAPTER /two.gguf
LICENSE """
first
"""
LICENSE second
MESSAGE user Is Toronto in Canada?
MESSAGE assistant """yes,
it is"""
RENDERER qwen3
PARSER qwen3
REQUIRES 0.14.0
DRAFT ./draft.gguf
'''


def test_modelfile_becomes_a_model_that_loads(tmp_path: Path) -> None:
    imported = import_ollama(WHOLE, shown=str(tmp_path / "Modelfile"), name="ship")
    config = loads(imported, tmp_path).config
    ship = config.models["ship"]
    assert isinstance(ship, HeldModel)
    assert (ship.instance, ship.from_) == (("ollama",), str(tmp_path / "hull.gguf"))
    assert config.instances["ollama"].engine == "ollama"
    assert ship.modelfile is not None
    assert ship.modelfile.model_dump(exclude_defaults=True) == {
        "template": "{{ if .System }}{{ .System }}{{ end }}\n{{ .Prompt }} costs $5 {port}",
        "system": "You are a ship.",
        "parameters": {"temperature": 0.7, "num_ctx": 8192, "stop": ["</s>", "two words"], "use_mmap": False},
        "messages": (
            {"role": "user", "content": "Is Toronto in Canada?"}, {"role": "assistant", "content": "yes,\nit is"},
        ),
        "adapters": (str(tmp_path / "one.gguf"), "/two.gguf"),
        "projector": str(tmp_path / "mmproj.gguf"),
        "license": ("\nfirst\n", "second"), "renderer": "qwen3", "parser": "qwen3", "requires": "0.14.0",
    }  # fmt: skip
    report = said(imported)
    assert "ignores it" in report["ship:PARAMETER mirostat", "approximated"]
    assert "is no parameter" in report["ship:PARAMETER shape", "refused"]
    assert "line 11: '1.5' is not a whole number" in report["ship:PARAMETER seed", "refused"]
    assert "no draft models" in report["ship:DRAFT", "refused"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("FROM a", [("from", "", "a")]),
        ("  from\ta  \r\nSYSTEM b\r\n", [("from", "", "a"), ("system", "", "b")]),
        ("\ufeffFROM a\n\n# x\n", [("from", "", "a")]),
        ('FROM a\nSYSTEM "b\n# no comment\nc"', [("from", "", "a"), ("system", "", "b\n# no comment\nc")]),
        ('FROM a\nSYSTEM """b "quoted" """\n', [("from", "", "a"), ("system", "", 'b "quoted" ')]),
        ('FROM a\nSYSTEM """\n"""', [("from", "", "a"), ("system", "", "\n")]),
        ("FROM a\nSYSTEM b\u200bc\u00a0d", [("from", "", "a"), ("system", "", "bcd")]),
        ("FROM a\nPARAMETER\tstop\tb c", [("from", "", "a"), ("parameter", "stop", "b c")]),
        ("FROM a\nMESSAGE user hi: there", [("from", "", "a"), ("message", "user", "hi: there")]),
        ("FROM a # b", [("from", "", "a # b")]),
    ],
)
def test_grammar_is_that_of_ollama(text: str, expected: list[tuple[str, str, str]]) -> None:
    found = parse_modelfile(text, "Modelfile")
    assert [(one.name, one.argument, one.value) for one in found] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("FROM a\n\nFORM b", r"Modelfile:3.*'FORM' is no command"),
        ('FROM a\nSYSTEM\n """b', "is no command"),
        ('FROM a\nSYSTEM """b', "Modelfile:2.*quote of SYSTEM is not closed"),
        ('FROM a\nSYSTEM "', "quote of SYSTEM is not closed"),
        ("FROM a\nMESSAGE tool b", "role of a MESSAGE"),
        ("SYSTEM a", "no FROM line"),
        ("FROM \nSYSTEM a", "no FROM line"),
    ],
)
def test_modelfile_that_ollama_rejects_is_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        import_ollama(text, shown="Modelfile", name="m")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("FROM a", True),
        ("# c\n\nparameter x 1\nFROM a", True),
        ("NAME ID", False),
        ("{}", False),
        ("FROM", True),
        ("", False),
    ],
)
def test_modelfile_is_recognised(text: str, found: bool) -> None:
    assert is_modelfile(text) is found


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("ships/Modelfile", "ships"),
        ("Modelfile.mario", "mario"),
        ("Modelfile-Mario 2", "mario-2"),
        ("mario.modelfile", "mario"),
        ("mario", "mario"),
        ("-", "model"),
    ],
)
def test_model_is_named_after_its_file(file: str, name: str, tmp_path: Path) -> None:
    shown = file if file == "-" else str(tmp_path / file)
    imported = import_ollama("FROM llama3.2", shown=shown, instance=["gpu"])
    assert imported.data == {"version": 1, "models": {name: {"instance": "gpu", "from": "llama3.2"}}}


def test_model_named_like_its_base_gets_another_name() -> None:
    found = import_ollama("FROM llama3.2:latest\nSYSTEM a", shown="-", name="llama3.2").data["models"]["llama3.2"]
    assert (found["from"], found["served_as"]) == ("llama3.2:latest", "llama3.2-own")
    with pytest.raises(ConfigError, match="--name"):
        import_ollama("FROM a", shown="-", name="no name")


def test_folder_beside_the_modelfile_is_a_path(tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    found = import_ollama("FROM weights", shown=str(tmp_path / "Modelfile"), name="m").data["models"]["m"]
    assert found["from"] == str(tmp_path / "weights")


def test_importers_know_the_parameters_that_check_knows() -> None:
    values: dict[str, Any] = {
        **dict.fromkeys(ollama_parameters.WHOLE, 1), **dict.fromkeys(ollama_parameters.REAL, 0.5),
        **dict.fromkeys(ollama_parameters.FLAGS, True), "stop": ["x"],
    }  # fmt: skip
    assert set(values) == built.PARAMETERS
    assert built.modelfile_problems({"parameters": values}) == []
    assert not ollama_parameters.REMOVED & built.PARAMETERS
