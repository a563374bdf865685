"""Warnings of `check` about the file of a held model: missing, or not a model."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import tiny_gguf
from fleetd.models.formats import gguf
from tests.unit.resolver.test_build import resolved

FOLDER = "instances: {{ol: {{engine: ollama, options: {{models_dir: {folder}}}}}}}\n"


def warnings(folder: Path, models: str, **around: object) -> dict[str, str]:
    """Return the warnings of models by their place."""
    found = resolved(folder, FOLDER.format(folder=folder) + f"models: {{{models}}}\n", **around)
    assert not found.problems
    return {one.path: one.message for one in found.warnings if one.path.startswith("models.")}


def test_missing_file_is_reported_at_its_key(tmp_path: Path) -> None:
    tiny_gguf.write(tmp_path / "there.gguf")
    found = warnings(
        tmp_path,
        "typo: {instance: ol, from: ./ther.gguf, memory: 1GiB}, fine: {instance: ol, from: ./there.gguf},"
        "named: {instance: ol, from: llama3, memory: 1GiB}, plain: {instance: ol, memory: 1GiB}",
    )
    assert found == {"models.typo.from": f"{tmp_path / 'ther.gguf'} does not exist: typo cannot be built until it does"}


def test_missing_file_of_a_stored_model_is_not_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetd.models.ollama.store.model_file", lambda *_: tmp_path / "blob")
    assert warnings(tmp_path, "m: {instance: ol, from: ./gone.gguf, memory: 1GiB}") == {}


def test_unreadable_store_still_reports_the_missing_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(*_: object) -> None:
        raise ValueError("is no manifest")

    monkeypatch.setattr("fleetd.models.ollama.store.model_file", unreadable)
    assert "models.m.from" in warnings(tmp_path, "m: {instance: ol, from: ./gone.gguf, memory: 1GiB}")


@pytest.mark.parametrize("broken", ["cut", "text", "empty"])
def test_broken_file_is_reported_at_its_key(broken: str, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf")
    path.write_bytes({"cut": path.read_bytes()[:500], "text": b"<html>" * 100, "empty": b""}[broken])
    found = warnings(tmp_path, f"m: {{instance: ol, from: {path}}}")
    assert list(found) == ["models.m.from"]
    assert found["models.m.from"].startswith(f"{path} is not a usable GGUF file: ")


def test_file_is_read_only_for_an_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Thousands of files may lie on a slow drive."""
    path = tiny_gguf.write(tmp_path / "m.gguf")
    looked: list[Path] = []
    monkeypatch.setattr(gguf, "read", lambda one: looked.append(one))
    assert warnings(tmp_path, f"m: {{instance: ol, from: {path}, memory: 1GiB}}") == {}
    assert looked == []
