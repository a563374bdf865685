"""`fleetctl import`: where the parts and the report go. What the importers make of a file is tested with them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from fleetd.cli import importing
from fleetd.cli.client import CliError
from fleetd.errors import ConfigError, Problem


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def convert(text: str, *, shown: str) -> Any:
        if "bad" in text:
            raise ConfigError([Problem(shown, 3, 1, "", "cannot be read")])
        report = SimpleNamespace(lines=lambda: ["watch: not carried\x1b[2J over"])
        return SimpleNamespace(text="services: {}", report=report)

    def from_path(path: Path, *, profile: str | None = None) -> Any:
        report = SimpleNamespace(lines=list)
        return SimpleNamespace(text=f"path: {path.name}, profile: {profile}", report=report)

    found = SimpleNamespace(import_pm2=convert, import_other=from_path)
    monkeypatch.setattr(importing.import_.params[0], "type", click.Choice(["pm2", "other"]))
    monkeypatch.setattr(importlib, "import_module", lambda _name: found)
    path = tmp_path / "ecosystem.json"
    path.write_text("{}")
    return path


def run(*arguments: str) -> Any:
    return importing.import_.main(list(arguments), standalone_mode=False)


def test_parts_and_report_are_apart(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("pm2", str(source)) == 0
    shown = capsys.readouterr()
    assert shown.out == "services: {}\n"
    assert shown.err == "watch: not carried over\n"


def test_a_new_file_is_written_and_an_old_one_kept(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("parts.yaml")
    assert run("pm2", str(source), "-o", str(out)) == 0
    assert out.read_text() == "services: {}\n"
    assert capsys.readouterr().out == ""
    out.write_text("mine")
    with pytest.raises(CliError, match="is there already"):
        run("pm2", str(source), "-o", str(out))
    assert out.read_text() == "mine"


def test_what_cannot_be_read(source: Path) -> None:
    with pytest.raises(CliError, match="No such file") as caught:
        run("pm2", str(source.with_name("absent")))
    assert caught.value.exit_code == 2
    source.write_text("bad")
    with pytest.raises(CliError, match="cannot be read") as caught:
        run("pm2", str(source))
    assert caught.value.exit_code == 2
    with pytest.raises(CliError):
        run("pm2", str(source.parent))
    source.write_bytes(b"\xff\xfe")
    with pytest.raises(CliError, match="UTF-8"):
        run("pm2", str(source))
    with pytest.raises(click.UsageError):
        run("supervisord", str(source))


def test_an_option_of_another_kind(source: Path) -> None:
    for option in ("--instance", "--env"):
        with pytest.raises(click.UsageError, match="means nothing"):
            run("pm2", str(source), option, "x")


def test_an_importer_that_wants_the_file_itself(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other", str(source), "--env", "production") == 0
    assert capsys.readouterr().out == "path: ecosystem.json, profile: production\n"
    with pytest.raises(CliError):
        run("other", str(source.with_name("absent")))


def test_the_kinds_are_the_importers_that_are_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importing, "FOLDER", tmp_path / "none")
    assert importing.kinds() == []
    monkeypatch.setattr(importing, "FOLDER", tmp_path)
    (tmp_path / "__init__.py").write_text("")
    (tmp_path / "llama_swap.py").write_text("x = 1\ndef import_llama_swap(text):\n    pass\n")
    (tmp_path / "shape.py").write_text("class Imported: pass\n")
    assert importing.kinds() == ["llama-swap"]
