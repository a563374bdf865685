"""What PM2 would run, and what an import of its files keeps back: programs, secrets, stopped apps, ports, the report."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from fleetd.config.importers import nodejs
from fleetd.config.importers.pm2.files import import_document, import_pm2
from fleetd.config.importers.pm2.program import command_of, says_ready
from fleetd.config.importers.report import Imported, Report
from fleetd.config.load import load

needs_node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not on PATH")


def text_of(imported: Imported) -> str:
    return "\n".join(imported.report.lines())


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with programs of all kinds, and `tool` and `tool.py` on PATH only."""
    work, path = tmp_path / "work", tmp_path / "path"
    for place in (work / "dist", path):
        place.mkdir(parents=True)
    (work / "binary").write_bytes(b"\x7fELF\x02\0\0")
    for name in ("www", "dist/index.js", "a.js"):
        (work / name).write_text("process.on('exit', () => 0)")
    (work / "shell").write_text("#!/bin/sh\n")
    (work / "empty").write_text("")
    for name in ("tool", "tool.py"):
        (path / name).write_text("#!/bin/sh\n")
        (path / name).chmod(0o755)
    for name in ("binary", "shell"):
        (work / name).chmod(0o755)
    os.mkfifo(work / "pipe")
    monkeypatch.setenv("PATH", str(path))
    return work


@pytest.mark.parametrize(
    ("script", "interpreter", "words"),
    [
        ("a.js", None, ["node", "a.js"]),
        ("www", None, ["node", "www"]),
        ("./www", None, ["node", "./www"]),
        ("dist", None, ["node", "dist"]),
        (".", None, ["node", "."]),
        ("binary", None, ["./binary"]),
        ("./binary", None, ["./binary"]),
        ("shell", None, ["./shell"]),
        ("empty", None, ["./empty"]),
        ("pipe", None, ["./pipe"]),
        ("tool", None, ["tool"]),
        ("tool.py", None, ["python3", "PATH/tool.py"]),
        ("missing", None, ["missing"]),
        ("missing.js", None, ["node", "missing.js"]),
        ("binary", "none", ["./binary"]),
        ("tool", "none", ["tool"]),
        ("tool", "node", ["node", "PATH/tool"]),
        ("./tool", "node", ["node", "./tool"]),
        ("missing", "python3", ["python3", "missing"]),
        ("www", "/opt/bin/ruby", ["/opt/bin/ruby", "www"]),
    ],
)
def test_command_is_the_one_that_pm2_runs(script: str, interpreter: str | None, words: list[str], folder: Path) -> None:
    expected = [word.replace("PATH", str(folder.parent / "path")) for word in words]
    assert command_of(script, interpreter, [], ["-x"], folder) == [*expected, "-x"]


def test_command_without_a_folder_is_what_the_app_says() -> None:
    assert command_of("no-such-program", None, [], [], None) == ["no-such-program"]
    assert command_of("a.py", None, ["-u"], ["x"], None) == ["python3", "-u", "a.py", "x"]


@pytest.mark.parametrize(
    ("text", "ready"),
    [
        ("process.send('ready')", True),
        ('process.send && process.send("ready");', True),
        ("process.send?.(`ready`)", True),
        ("process.send({type: 'ready'})", False),
        ("console.log('ready')", False),
    ],
)
def test_ready_message_is_found_in_the_program(text: str, ready: bool, tmp_path: Path) -> None:
    (tmp_path / "a.js").write_text(text)
    assert says_ready(tmp_path / "a.js") is ready
    app = {"name": "a", "script": "a.js", "wait_ready": True}
    entry = import_document([app], folder=tmp_path).data["services"]["a"]
    assert ("probes" in entry) is ready


SECRETS = """
const token = process.env.BOT_TOKEN;
module.exports = {apps: [{name: 'bot', script: 'bot.js', args: ['--token', token], cwd: '/srv',
  env: {BOT_TOKEN: token, HEADER: `$Bearer ${token}`, DB: process.env.DATABASE_URL, MODE: process.env.MODE, NONE: process.env.NO_TOKEN}}]};
"""


@needs_node
def test_secrets_of_the_environment_become_references(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"BOT_TOKEN": "very-secret", "DATABASE_URL": "postgres://u:hidden@h/db"}
    for name, value in {**secrets, "MODE": "live"}.items():
        monkeypatch.setenv(name, value)
    path = tmp_path / "ecosystem.config.js"
    path.write_text(SECRETS)
    imported = import_pm2(path)
    for value in ("very-secret", "hidden", "\ue000"):
        assert value not in imported.text + text_of(imported)
    assert 'BOT_TOKEN: "${BOT_TOKEN}"' in imported.text
    assert "process.env.BOT_TOKEN, process.env.DATABASE_URL: is a secret" in text_of(imported)
    (tmp_path / "fleet.yaml").write_text(imported.text)
    bot = load(tmp_path / "fleet.yaml", secrets).config.services["bot"]
    assert bot.command == ("node", "bot.js", "--token", "very-secret")
    assert bot.env == {
        "BOT_TOKEN": "very-secret", "HEADER": "$Bearer very-secret", "DB": secrets["DATABASE_URL"], "MODE": "live",
        "NODE_APP_INSTANCE": "0",
    }  # fmt: skip


@needs_node
def test_file_sees_a_secret_only_if_it_may(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_TOKEN", "very-secret")
    path = tmp_path / "ecosystem.config.js"
    path.write_text("module.exports = {seen: process.env.BOT_TOKEN === 'very-secret'}")
    assert nodejs.evaluate(path)[0] == {"seen": False}
    assert nodejs.evaluate(path, secrets=True)[0] == {"seen": True}


@needs_node
def test_copied_environment_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BOT_TOKEN", "very-secret")
    path = tmp_path / "ecosystem.config.js"
    path.write_text("module.exports = {apps: [{script: './a', env: {...process.env, LANG: 'xx', X: '1'}}]}")
    assert import_pm2(path).data["services"]["a"]["env"] == {"LANG": "xx", "X": "1"}


def dumped(name: str, status: str, **more: Any) -> dict[str, Any]:
    return {"name": name, "status": status, "pm_exec_path": f"/srv/{name}.js", "exec_interpreter": "node", **more}


def test_stopped_apps_of_a_dump_stay_stopped() -> None:
    apps = [dumped("new", "online"), dumped("old", "stopped"), dumped("bad", "errored"), dumped("two", "stopped"),
            dumped("two", "online")]  # fmt: skip
    imported = import_document(apps)
    services = imported.data["services"]
    assert {name: entry.get("enabled", True) for name, entry in services.items()} == {
        "new": True, "old": False, "bad": True, "two": True,
    }  # fmt: skip
    assert "old.status" in text_of(imported)


def test_memory_limit_of_ollama_is_left_out_and_reported() -> None:
    app = {"name": "o", "script": "ollama", "args": "serve", "interpreter": "none", "max_memory_restart": "1G"}
    imported = import_document([app])
    assert "limits" not in imported.data["instances"]["o"]
    assert "warning      o.max_memory_restart: 1GiB is left out" in text_of(imported)


def test_advice_about_the_gateway_is_true() -> None:
    app = {"name": "o", "script": "ollama", "args": "serve", "env": {"OLLAMA_HOST": "0.0.0.0:11434"}}
    imported = import_document([app])
    said = text_of(imported) + imported.text
    assert "other machines reach it no longer" in said
    assert "gateway.insecure: true" in said
    assert "should speak to the gateway" not in said


def test_port_of_the_gateway_is_left_to_the_app(tmp_path: Path) -> None:
    apps = [{"name": "a", "script": "a.js", "port": 8484}, {"name": "b", "script": "b.js", "port": 8486}]
    imported = import_document(apps)
    assert imported.data["gateway"] == {"listen": "127.0.0.1:8487"}
    (tmp_path / "fleet.yaml").write_text(imported.text)
    assert load(tmp_path / "fleet.yaml", {}).config.services["a"].port == 8484
    assert "gateway" not in import_document(apps[1:]).data


@pytest.mark.parametrize(
    ("cron", "times", "outcome"),
    [
        ("*/5 * * * *", "*/5 * * * *", "mapped"),
        ("30 0 4 * * *", "0 4 * * *", "approximated"),
        ("*/30 * * * * *", None, "refused"),
        ("61 * * * *", None, "refused"),
        ("@hourly", "0 * * * *", "mapped"),
    ],
)
def test_times_of_a_job_are_kept_or_reported(cron: str, times: str | None, outcome: str) -> None:
    app = {"name": "a", "script": "./a", "autorestart": False, "cron_restart": cron}
    imported = import_document([app], timezone="UTC")
    schedule = imported.data["services"]["a"].get("schedule")
    assert schedule == (None if times is None else {"start": times, "restart": times, "timezone": "UTC"})
    assert outcome in {str(one.outcome) for one in imported.report.entries if one.field == "cron_restart"}


def test_report_lines_join_equal_details_and_count_the_rest() -> None:
    report = Report()
    for name in "abcdefgh":
        report.refused(name, "x", "same")
    report.mapped("a", "y", "one")
    report.checked(["bad"], ["odd"])
    assert report.lines() == [
        "problem      bad",
        "warning      odd",
        "refused      a.x, b.x, c.x, d.x, e.x, f.x and 2 more: same",
        "mapped       1 field",
    ]
    assert not report.accepted


def test_import_of_many_apps_says_each_thing_once() -> None:
    apps = json.loads(json.dumps([{"name": f"a{n}", "script": "a.js", "cwd": "/srv"} for n in range(30)]))
    assert len(import_document(apps).report.lines()) == 2
