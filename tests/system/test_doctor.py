"""`fleetctl doctor` next to a real daemon, and after one that died."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

from tests.support.cli import fleetctl
from tests.support.daemon import Fleetd, fleetd
from tests.support.ports import free_port


def findings(daemon: Fleetd) -> dict[str, dict[str, Any]]:
    """Return the worst finding of each check."""
    arguments = ("--socket", str(daemon.socket), "doctor", "-o", "json", "--config", str(daemon.config))
    ran = fleetctl(*arguments, HOME=str(daemon.folder))
    order = ("PASS", "WARN", "FAIL")
    rows = sorted(json.loads(ran.out)["findings"], key=lambda row: order.index(row["verdict"]))
    return {row["check"]: row for row in rows}


def test_doctor_with_a_daemon_and_after_its_death(tmp_path: Path) -> None:
    port = free_port()
    fleet = f"""
    services:
      web:
        command: [python3, -m, http.server, "{port}", --bind, 127.0.0.1]
        port: {port}
        probes: {{readiness: {{tcp: true}}}}
    """
    with fleetd(tmp_path, fleet) as daemon:
        daemon.start()
        daemon.until_state("web", "READY")
        running = findings(daemon)
        assert running["daemon"]["verdict"] == "PASS"
        assert running["ports"]["verdict"] == "PASS", running["ports"]
        assert "left" not in running
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        dead = findings(daemon)
        assert dead["daemon"]["verdict"] == "WARN"
        assert dead["left"]["verdict"] == "WARN"
        assert "web (pid " in dead["left"]["text"]
        assert dead["ports"]["verdict"] == "PASS", "the next daemon adopts what listens there"
