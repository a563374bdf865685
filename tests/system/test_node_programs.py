"""A PM2 app, imported by fleetctl and run with real Node: what it expects from PM2 works under fleetd."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.daemon import ROOT, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until

APP = """
const fs = require('fs');
const note = text => fs.appendFileSync('lines.txt', text + '\\n');
process.on('SIGINT', () => { note('signal'); process.exit(3); });
process.on('SIGTERM', () => { note('signal'); process.exit(3); });
process.on('message', message => {
  note('message ' + JSON.stringify(message));
  if (message === 'shutdown') setTimeout(() => { note('saved'); process.exit(0); }, 50);
});
if (process.env.LEAVES_CHANNEL) process.disconnect();
setInterval(() => {}, 1000);
note('up');
"""
node = pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")


def imported(folder: Path, *apps: dict[str, Any], **env: str) -> str:
    """Return the services that `fleetctl import pm2` writes for an ecosystem file."""
    (folder / "app.js").write_text(APP)
    (folder / "ecosystem.config.js").write_text(f"module.exports = {json.dumps({'apps': apps})};\n")
    out = folder / "parts.yaml"
    subprocess.run(
        [sys.executable, "-m", "fleetd.cli.fleetctl", "import", "pm2", "ecosystem.config.js", "-o", str(out)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT), **env},
        check=True,
        capture_output=True,
        timeout=60,
    )
    parts = yaml.safe_load(out.read_text())
    return yaml.safe_dump({"services": parts["services"]})


def lines(folder: Path) -> list[str]:
    path = folder / "lines.txt"
    return path.read_text().split("\n")[:-1] if path.exists() else []


def app(**more: Any) -> dict[str, Any]:
    return {"name": "bot", "script": "app.js", "kill_timeout": 20000, **more}


@node
@pytest.mark.parametrize(
    ("more", "expected", "code"),
    [
        ({"shutdown_with_message": True}, ['message "shutdown"', "saved"], 0),
        ({"shutdown_with_message": False}, ["signal"], 3),
        ({"shutdown_with_message": True, "env": {"LEAVES_CHANNEL": "1"}}, ["signal"], 3),
    ],
    ids=["message", "signal", "a channel that it closed"],
)
def test_stop_reaches_the_app_as_under_pm2(
    more: dict[str, Any], expected: list[str], code: int, tmp_path: Path
) -> None:
    with fleetd(tmp_path, imported(tmp_path, app(**more))).start() as daemon:
        until(lambda: lines(tmp_path) == ["up"], "the app is up")
        daemon.until_state("bot", "READY")
        assert daemon.control("POST", "/v1/processes/bot/stop?wait=true", {}).status == 200
        assert lines(tmp_path) == ["up", *expected]
        assert daemon.process_row("bot")["last_exit"]["code"] == code


@node
def test_restart_and_shutdown_send_the_stop_message(tmp_path: Path) -> None:
    with fleetd(tmp_path, imported(tmp_path, app(shutdown_with_message=True))).start() as daemon:
        until(lambda: lines(tmp_path) == ["up"], "the app is up")
        daemon.until_state("bot", "READY")
        assert daemon.control("POST", "/v1/processes/bot/restart?wait=true", {}).status == 200
        until(
            lambda: lines(tmp_path) == ["up", 'message "shutdown"', "saved", "up"], "it got the message and is up again"
        )
        assert daemon.stop() == 0
        assert lines(tmp_path)[4:] == ['message "shutdown"', "saved"]


NOTES = """
const [name] = process.argv.slice(2, 3);
const {NODE_APP_INSTANCE, PORT, FORMAT} = process.env;
require('fs').appendFileSync('lines.txt', JSON.stringify([name, process.argv.slice(3), NODE_APP_INSTANCE, PORT, FORMAT]) + '\\n');
setInterval(() => {}, 1000);
"""


def test_scripts_are_found_and_numbered_as_under_pm2(tmp_path: Path) -> None:
    """No file is executable; `tool` is on PATH only."""
    for path in ("bin/www", "dist/index.js", "notes.js", "path/tool"):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(NOTES)
    (tmp_path / "path" / "tool").chmod(0o755)
    port = str(free_port())
    apps = [
        {
            "name": "www",
            "script": "./bin/www",
            "args": "www --fmt '{name} {port}' --json {\"x\":1}",
            "env": {"PORT": port},
        },
        {"name": "twin", "script": "./dist", "args": "twin", "env": {"PORT": port, "FORMAT": "{name}: {{name}}"}},
        {
            "name": "many",
            "script": "notes.js",
            "args": ["many"],
            "exec_mode": "fork",
            "instances": 2,
            "wait_ready": True,
        },
        {"name": "tool", "script": "tool", "args": "tool", "interpreter": "node"},
    ]
    text = imported(tmp_path, *apps, PATH=f"{tmp_path / 'path'}:{os.environ['PATH']}")
    with fleetd(tmp_path, text).start():
        until(lambda: len(lines(tmp_path)) == 5, "all apps run")
        assert sorted(json.loads(line) for line in lines(tmp_path)) == [
            ["many", [], "0", None, None],
            ["many", [], "1", None, None],
            ["tool", [], "0", None, None],
            ["twin", [], "0", port, "{name}: {{name}}"],
            ["www", ["--fmt", "{name} {port}", "--json", '{"x":1}'], "0", port, None],
        ]


test_scripts_are_found_and_numbered_as_under_pm2 = node(test_scripts_are_found_and_numbered_as_under_pm2)


@node
def test_a_poller_goes_on_and_a_failing_app_gives_up(tmp_path: Path) -> None:
    common = {"script": "sh", "interpreter": "none", "restart_delay": 10, "max_restarts": 4, "min_uptime": 100}
    apps = [
        {"name": "poller", "args": ["-c", "sleep 0.2"], **common},
        {"name": "failing", "args": ["-c", "exit 1"], **common},
    ]
    with fleetd(tmp_path, imported(tmp_path, *apps)).start() as daemon:
        daemon.until_state("failing", "FAILED")
        until(lambda: daemon.process_row("poller")["restarts"] >= 8, "the poller comes back")
        assert daemon.process_row("poller")["state"] != "FAILED"
