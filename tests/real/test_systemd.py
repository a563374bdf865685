"""fleetd under a real systemd as process 1: start, reload, watchdog, a killed daemon, stop."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.container import Machine, systemd_machine, why_not

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

FLEET = """
version: 1
paths: {state: /var/lib/fleetd, run: /run/fleetd, logs: /var/log/fleetd}
gateway: {listen: 127.0.0.1:8484}
services:
  first: {command: [/bin/sleep, "86401"]}
  second: {command: [/bin/sleep, "86402"]}
instances:
  engine: {engine: process, command: [python3, /opt/fake/fake_model_server.py, --port, "{port}"], port: 21500, options: {api: openai}, probes: {startup: {http: /health}}}
"""
CTL = "/opt/fleetd/bin/fleetctl --socket /run/fleetd/fleetd.sock"
PIDS = "pgrep -f 'sleep 8640[12]|fake_model_serve[r]' | sort"


@pytest.fixture(scope="module")
def machine() -> Iterator[Machine]:
    reason = why_not()
    if reason is not None:
        pytest.skip(f"a container with systemd: {reason}")
    with systemd_machine() as made:
        fakes = Path(__file__).parents[1] / "fakes"
        (made.root / "opt/fake").mkdir()
        for source in fakes.glob("*.py"):
            (made.root / "opt/fake" / source.name).write_text(source.read_text())
        (made.root / "etc/fleetd").mkdir()
        (made.root / "etc/fleetd/fleet.yaml").write_text(FLEET)
        made.sh(
            "python3 -m venv /opt/fleetd && /opt/fleetd/bin/pip install --quiet --no-index --find-links /wheels fleetd",
            timeout_s=600,
        )
        made.sh("/opt/fleetd/bin/fleetd check /etc/fleetd/fleet.yaml")
        made.sh("PATH=/opt/fleetd/bin:$PATH fleetctl install-service --config /etc/fleetd/fleet.yaml --run-as root")
        # a short watchdog, so that the test need not wait for the real one
        made.sh(
            "mkdir -p /etc/systemd/system/fleetd.service.d && printf '[Service]\\nWatchdogSec=4s\\n' > /etc/systemd/system/fleetd.service.d/test.conf"
        )
        made.sh("systemctl daemon-reload && systemctl start fleetd", timeout_s=60)
        yield made


@pytest.fixture
def running(machine: Machine) -> Machine:
    """The unit is active and all three processes are ready."""
    machine.sh("systemctl is-active fleetd || { systemctl reset-failed fleetd; systemctl start fleetd; }")
    machine.until(f'{CTL} status -o json | grep -o \'"state": *"READY"\' | wc -l | grep -qx 3')
    return machine


def main_pid(machine: Machine) -> str:
    return machine.sh("systemctl show -p MainPID --value fleetd")


def test_the_unit_is_valid_and_says_ready_itself(running: Machine) -> None:
    running.sh("systemd-analyze verify /etc/systemd/system/fleetd.service")
    assert running.sh("systemctl show -p Type --value fleetd") == "notify"
    assert running.sh("systemctl is-active fleetd") == "active"
    exposure = running.sh("systemd-analyze security fleetd.service --no-pager", check=False)
    score = re.search(r"Overall exposure level for fleetd.service: ([\d.]+)", exposure)
    assert score is not None, exposure[-400:]
    assert float(score.group(1)) <= 9.0


def test_reload_changes_only_what_the_file_changes(running: Machine) -> None:
    before = set(running.sh(PIDS).split())
    config = running.root / "etc/fleetd/fleet.yaml"
    config.write_text(FLEET.replace("services:\n", 'services:\n  third: {command: [/bin/sleep, "86403"]}\n'))
    running.sh("systemctl reload fleetd")
    running.until("pgrep -f 'sleep 8640[3]'")
    assert set(running.sh(PIDS).split()) == before
    config.write_text(FLEET)
    running.sh("systemctl reload fleetd")
    running.until("! pgrep -f 'sleep 8640[3]'")
    assert set(running.sh(PIDS).split()) == before


def test_a_killed_daemon_leaves_the_engines_and_adopts_them(running: Machine) -> None:
    before, daemon = running.sh(PIDS), main_pid(running)
    running.sh(f"kill -KILL {daemon}")
    assert running.sh(PIDS) == before
    running.until(
        f"test $(systemctl show -p MainPID --value fleetd) != {daemon} && test $(systemctl show -p MainPID --value fleetd) != 0"
    )
    running.until(f'{CTL} status -o json | grep -o \'"state": *"READY"\' | wc -l | grep -qx 3')
    assert running.sh(PIDS) == before
    assert '"restarts": 0' in running.sh(f"{CTL} status -o json")


def test_a_hung_daemon_is_restarted_by_the_watchdog(running: Machine) -> None:
    before, daemon = running.sh(PIDS), main_pid(running)
    running.sh(f"kill -STOP {daemon}")
    running.until(
        f"test $(systemctl show -p MainPID --value fleetd) != {daemon} && test $(systemctl show -p MainPID --value fleetd) != 0",
        90,
    )
    running.until(f'{CTL} status -o json | grep -o \'"state": *"READY"\' | wc -l | grep -qx 3')
    assert running.sh(PIDS) == before


def test_stop_leaves_nothing(running: Machine) -> None:
    running.sh("systemctl stop fleetd", timeout_s=90)
    assert running.sh(PIDS, check=False) == ""
    assert running.sh("systemctl is-failed fleetd", check=False) == "inactive"
    running.sh("systemctl start fleetd")
    running.until(f'{CTL} status -o json | grep -o \'"state": *"READY"\' | wc -l | grep -qx 3')
