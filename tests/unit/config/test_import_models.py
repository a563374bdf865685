"""Imports from Ollama: the result, the report, and that the result loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.config.importers.ollama import import_ollama
from fleetd.config.importers.report import Imported
from fleetd.config.load import LoadedConfig, load
from fleetd.errors import ConfigError


def loads(imported: Imported, folder: Path, env: dict[str, str] | None = None) -> LoadedConfig:
    path = folder / "fleet.yaml"
    path.write_text(imported.text, encoding="utf-8")
    return load(path, env or {})


def said(imported: Imported) -> dict[tuple[str, str], str]:
    return {(f"{one.subject}:{one.field}", str(one.outcome)): one.detail for one in imported.report.entries}


TABLE = """NAME                       ID              SIZE      MODIFIED
llama3.2:latest            a80c4f17acd5    2.0 GB    3 days ago
tsc-ulysses:q8_0           b80c4f17acd5    8.5 GB    4 weeks ago
gpt-oss:120b-cloud         c80c4f17acd5    -         4 weeks ago
"""
TAGS = """{"models": [{"name": "llama3.2:latest", "size": 1, "details": {"families": ["llama"]}},
 {"name": "nomic-embed-text:v1.5", "details": {"families": ["nomic-bert"]}}, {"name": "far:1", "remote_host": "https://x", "details": {}},
 {"name": "bad name", "details": {}}, {"name": "llama3.2", "details": {}}, 7]}"""


def test_what_ollama_lists_becomes_models(tmp_path: Path) -> None:
    imported = import_ollama(TABLE)
    assert imported.data == {
        "version": 1,
        "instances": {"ollama": {"engine": "ollama"}},
        "models": {
            "llama3.2": {"instance": "ollama", "served_as": "llama3.2:latest"},
            "tsc-ulysses:q8_0": {"instance": "ollama"},
        },
    }
    assert "left out" in said(imported)["gpt-oss:120b-cloud:", "refused"]
    assert list(loads(imported, tmp_path).config.models) == ["llama3.2", "tsc-ulysses:q8_0"]
    on_a_drive = import_ollama(TABLE, models_dir="/Volumes/BOWIE/ollama").data["instances"]["ollama"]
    assert on_a_drive == {
        "engine": "ollama",
        "options": {"models_dir": "/Volumes/BOWIE/ollama"},
        "requires": ["/Volumes/BOWIE"],
    }


def test_what_ollamas_api_tells_becomes_models() -> None:
    imported = import_ollama(TAGS, instance=["a", "b"])
    assert imported.data == {
        "version": 1,
        "models": {
            "llama3.2": {"instance": ["a", "b"], "served_as": "llama3.2:latest"},
            "nomic-embed-text:v1.5": {"instance": ["a", "b"], "embedding": True},
        },
    }


@pytest.mark.parametrize("text", ["", "hello\n", "{", "{}", "7", "[" * 50_000])
def test_lists_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        import_ollama(text)
