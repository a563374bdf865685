"""`fleetctl import`: where the parts and the report go. What the importers make of a file is tested with them."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import click
import pytest

from fleetd.cli.client import CliError
from fleetd.cli.commands import import_
from fleetd.config import importers
from fleetd.config.importers.report import Report
from fleetd.errors import ConfigError, Problem


def stand_in(monkeypatch: pytest.MonkeyPatch, module: SimpleNamespace) -> None:
    """Let `module` stand for the modules of the kinds "one" and "other"."""
    real = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest, **more: module if name in ("one", "other") else real(name, *rest, **more),
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def convert(text: str, *, shown: str) -> Any:
        if "bad" in text:
            raise ConfigError([Problem(shown, 3, 1, "", "cannot be read")])
        report = Report()
        report.refused("watch", "", "not carried\x1b[2J over")
        return SimpleNamespace(text="services: {}", report=report)

    def from_path(path: Path, *, profile: str | None = None) -> Any:
        return SimpleNamespace(text=f"# path: {path.name}, profile: {profile}\nversion: 1", report=Report())

    found = SimpleNamespace(import_one=convert, import_other=from_path)
    monkeypatch.setattr(import_.import_.params[0], "type", click.Choice(["one", "other"]))
    for kind in ("one", "other"):
        monkeypatch.setitem(import_.MODULES, kind, kind)
    stand_in(monkeypatch, found)
    path = tmp_path / "ecosystem.json"
    path.write_text("{}")
    return path


def run(*arguments: str) -> Any:
    return import_.import_.main(list(arguments), standalone_mode=False)


def test_parts_and_report_are_apart(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("one", str(source)) == 0
    shown = capsys.readouterr()
    assert shown.out == "services: {}\n"
    assert shown.err == "refused      watch: not carried over\n"


def test_import_writes_new_files_and_keeps_old_ones(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = source.with_name("parts.yaml")
    assert run("one", str(source), "-o", str(out)) == 0
    assert out.read_text() == "services: {}\n"
    assert capsys.readouterr().out == ""
    out.write_text("mine")
    with pytest.raises(CliError, match="already exists"):
        run("one", str(source), "-o", str(out))
    assert out.read_text() == "mine"


def test_unreadable_input_is_an_error(source: Path) -> None:
    with pytest.raises(CliError, match="No such file") as caught:
        run("one", str(source.with_name("absent")))
    assert caught.value.exit_code == 2
    source.write_text("bad")
    with pytest.raises(CliError, match="cannot be read") as caught:
        run("one", str(source))
    assert caught.value.exit_code == 2
    with pytest.raises(CliError):
        run("one", str(source.parent))
    source.write_bytes(b"\xff\xfe")
    with pytest.raises(CliError, match="UTF-8"):
        run("one", str(source))
    with pytest.raises(click.UsageError):
        run("supervisord", str(source))


def test_option_of_another_kind_is_a_usage_error(source: Path) -> None:
    for option in ("--instance", "--env"):
        with pytest.raises(click.UsageError, match="does not apply"):
            run("one", str(source), option, "x")


def test_importer_can_take_the_path(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("other", str(source), "--env", "production") == 0
    assert capsys.readouterr().out == "# path: ecosystem.json, profile: production\nversion: 1\n"
    with pytest.raises(CliError):
        run("other", str(source.with_name("absent")))


def test_import_kinds_name_every_importer() -> None:
    for kind, module in import_.MODULES.items():
        assert callable(getattr(importlib.import_module(module), f"import_{kind.replace('-', '_')}"))
    sources = Path(importers.__file__).parent.rglob("*.py")
    found = {
        name for path in sources for name in re.findall(r"^def import_(\w+)\(", path.read_text("utf-8"), re.MULTILINE)
    }
    assert found - {"document"} == {kind.replace("-", "_") for kind in import_.MODULES}


def test_import_of_a_rejected_result_reports_and_fails(
    source: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "services:\n  a: {command: [x], colour: blue}\n  b: {command: [x]}\n"

    def convert(text_of_file: str, *, shown: str) -> Any:
        return SimpleNamespace(text=text, report=Report())

    stand_in(monkeypatch, SimpleNamespace(import_one=convert))
    out = source.with_name("out.yaml")
    assert run("one", str(source), "-o", str(out)) == 1
    assert out.read_text() == text
    assert capsys.readouterr().err.startswith(f"problem      {out}:2:")
    assert run("one", str(source)) == 1
    assert capsys.readouterr().err.startswith("problem      fleet.yaml:2:")


@pytest.fixture
def god(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """The socket of PM2's daemon, and a program `pm2` that lists one app, after a banner as the real one has."""
    app = {
        "pid": 7,
        "name": "bot",
        "pm2_env": {"status": "online", "pm_exec_path": "/srv/bot/index.js", "pm_cwd": "/srv/bot"},
    }
    (tmp_path / "bin").mkdir()
    program = tmp_path / "bin" / "pm2"
    program.write_text(
        f"#!/bin/sh\n[ $1 = jlist ] && printf '%s\\n' 'In-memory PM2 is out-of-date' '{json.dumps([app])}'\n"
    )
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    with tempfile.TemporaryDirectory(dir="/tmp") as home, socket.socket(socket.AF_UNIX) as listener:  # a short path
        monkeypatch.setenv("PM2_HOME", home)
        listener.bind(f"{home}/rpc.sock")
        listener.listen()
        yield listener


def test_import_warns_about_an_app_that_pm2_runs(
    god: socket.socket, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "apps.json"
    path.write_text(json.dumps({"apps": [{"name": "bot", "script": "index.js", "cwd": "/srv/bot"}]}))
    assert run("pm2", str(path)) == 0
    assert (
        "warning      PM2 still runs bot (pid 7), which is bot here: pm2 delete bot && pm2 save"
        in capsys.readouterr().err
    )
    god.close()  # no daemon: asking would start one
    assert run("pm2", str(path)) == 0
    assert "still runs" not in capsys.readouterr().err
