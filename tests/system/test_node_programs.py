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


def imported(folder: Path, *apps: dict[str, Any]) -> str:
    """Return the services that `fleetctl import pm2` writes for an ecosystem file."""
    (folder / "app.js").write_text(APP)
    (folder / "ecosystem.config.js").write_text(f"module.exports = {json.dumps({'apps': apps})};\n")
    out = folder / "parts.yaml"
    subprocess.run(
        [sys.executable, "-m", "fleetd.cli.fleetctl", "import", "pm2", "ecosystem.config.js", "-o", str(out)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
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
