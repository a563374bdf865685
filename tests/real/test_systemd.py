"""fleetd under a real systemd as process 1, installed from its wheel: start, reload, watchdog, a killed daemon, stop."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.real.container import Machine, install_wheels, systemd_machine, why_not

pytestmark = [pytest.mark.real, pytest.mark.timeout(900)]

FLEET = """
version: 1
paths: {state: /var/lib/fleetd, run: /run/fleetd, logs: /var/log/fleetd}
gateway: {listen: 127.0.0.1:8484}
services:
  first: {command: [/bin/sleep, "86401"]}
  second: {command: [/bin/sleep, "86402"]}
instances:
  engine:
    engine: process
    command: [python3, /opt/fake/fake_model_server.py, --port, "{port}"]
    port: 21500
    options: {api: openai}
    probes: {startup: {http: /health}}
"""
CTL = "/opt/fleetd/bin/fleetctl --socket /run/fleetd/fleetd.sock"
PIDS = "pgrep -f 'sleep 8640[12]|fake_model_serve[r]' | sort"
MAIN = "systemctl show -p MainPID --value fleetd"
ALL_READY = f'{CTL} status -o json | grep -o \'"state": *"READY"\' | wc -l | grep -qx 3'


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
        made.sh("python3 -m venv --without-pip /opt/fleetd && useradd --system --home-dir /var/lib/fleetd fleet")
        made.sh("mknod /dev/nvidia0 c 195 0 && chmod 666 /dev/nvidia0")
        install_wheels(made.root / "wheels", made.root / "opt/fleetd/lib/python3.11/site-packages")
        made.sh("PATH=/opt/fleetd/bin:$PATH fleetd check -q /etc/fleetd/fleet.yaml")
        made.sh("PATH=/opt/fleetd/bin:$PATH fleetctl install-service --config /etc/fleetd/fleet.yaml --run-as fleet")
        # a short watchdog, so that the test need not wait for the real one, and no limit to how often a test may kill it
        drop_in = made.root / "etc/systemd/system/fleetd.service.d/test.conf"
        drop_in.parent.mkdir()
        drop_in.write_text("[Unit]\nStartLimitIntervalSec=0\n[Service]\nWatchdogSec=6s\n")
        made.sh("systemctl daemon-reload && systemctl start fleetd", timeout_s=90)
        yield made


@pytest.fixture
def running(machine: Machine) -> Machine:
    """The unit is active, its file is the first one, and all three processes are ready."""
    (machine.root / "etc/fleetd/fleet.yaml").write_text(FLEET)
    machine.sh("systemctl is-active fleetd || { systemctl reset-failed fleetd; systemctl start fleetd; }")
    machine.until(ALL_READY)
    return machine


def restarts(machine: Machine) -> list[int]:
    return [row["restarts"] for row in json.loads(machine.sh(f"{CTL} status -o json"))["processes"]]


def until_another_daemon(machine: Machine, old: str) -> None:
    machine.until(f"test $({MAIN}) != {old} && test $({MAIN}) != 0 && systemctl is-active fleetd", 90)
    machine.until(ALL_READY)


def test_unit_is_valid_and_notifies_ready(running: Machine) -> None:
    assert running.sh("systemd-analyze verify /etc/systemd/system/fleetd.service 2>&1") == ""
    assert running.sh("systemctl show -p Type --value fleetd") == "notify"
    assert running.sh("systemctl is-active fleetd") == "active"
    assert running.sh("systemctl show -p StatusText --value fleetd") == "3 processes, 0 models"
    assert running.sh(f"stat -c %U /proc/$({MAIN})") == "fleet"


def test_sandbox_allows_devices_only(running: Machine) -> None:
    report = running.sh("systemd-analyze security fleetd.service --no-pager", check=False)
    score = re.search(r"Overall exposure level for fleetd.service: ([\d.]+)", report)
    assert score is not None, report[-400:]
    assert float(score.group(1)) <= 4.2, report
    # The node of a GPU without its driver: "no such device" when it may be opened, "not permitted" when the sandbox forbids it.
    opening = 'services:\n  gpu: {command: [sh, -c, "cat /dev/nvidia0; true"], restart: {policy: never}}\n'
    (running.root / "etc/fleetd/fleet.yaml").write_text(FLEET.replace("services:\n", opening))
    running.sh("systemctl reload fleetd")
    assert "No such device" in running.until(f"{CTL} logs gpu -n 5 | grep nvidia0")


def test_reload_restarts_only_changed_processes(running: Machine) -> None:
    before = running.sh(PIDS)
    config = running.root / "etc/fleetd/fleet.yaml"
    config.write_text(FLEET.replace("services:\n", 'services:\n  third: {command: [/bin/sleep, "86403"]}\n'))
    running.sh("systemctl reload fleetd")
    running.until("pgrep -f 'sleep 8640[3]'")
    assert running.sh(PIDS) == before
    config.write_text(FLEET)
    running.sh("systemctl reload fleetd")
    running.until("! pgrep -f 'sleep 8640[3]'")
    assert running.sh(PIDS) == before


def test_reload_of_invalid_file_fails_and_changes_nothing(running: Machine) -> None:
    before, daemon = running.sh(PIDS), running.sh(MAIN)
    (running.root / "etc/fleetd/fleet.yaml").write_text(FLEET + "  engine: {again: 1}\n")
    assert running.sh("systemctl reload fleetd && echo reloaded", check=False) == ""
    assert (running.sh(PIDS), running.sh(MAIN)) == (before, daemon)
    assert running.sh("systemctl is-active fleetd") == "active"
    (running.root / "etc/fleetd/fleet.yaml").write_text(FLEET)
    running.sh("systemctl reload fleetd")
    assert running.sh(PIDS) == before


def test_engines_are_adopted_after_a_killed_daemon(running: Machine) -> None:
    before, counted = running.sh(PIDS), restarts(running)
    for _ in range(3):
        daemon = running.sh(MAIN)
        running.sh(f"kill -KILL {daemon}")
        assert running.sh(PIDS) == before
        until_another_daemon(running, daemon)
        assert running.sh(PIDS) == before
        assert restarts(running) == counted


def test_watchdog_restarts_a_hung_daemon(running: Machine) -> None:
    before, daemon, counted = running.sh(PIDS), running.sh(MAIN), restarts(running)
    running.sh(f"kill -STOP {daemon}")
    until_another_daemon(running, daemon)
    assert running.sh(PIDS) == before
    assert restarts(running) == counted
    assert "watchdog" in running.sh("journalctl -u fleetd --no-pager | grep -i watchdog | tail -1").lower()


def test_reexec_keeps_main_process_and_watchdog(running: Machine) -> None:
    before, daemon = running.sh(PIDS), running.sh(MAIN)
    running.sh(f"{CTL} daemon-reexec")
    running.until(ALL_READY)
    assert (running.sh(PIDS), running.sh(MAIN)) == (before, daemon)
    # a watchdog that is no longer fed would end it within six seconds
    running.until("test $(( $(cut -d. -f1 /proc/uptime) )) -gt " + str(_uptime_s(running) + 9))
    assert running.sh(MAIN) == daemon


def _uptime_s(machine: Machine) -> int:
    return int(float(machine.sh("cut -d' ' -f1 /proc/uptime")))


def test_stop_leaves_no_process(running: Machine) -> None:
    running.sh("systemctl stop fleetd", timeout_s=90)
    assert running.sh(PIDS, check=False) == ""
    assert running.sh("pgrep -u fleet", check=False) == ""
    assert running.sh("systemctl is-failed fleetd", check=False) == "inactive"
    running.sh("systemctl start fleetd")
    running.until(ALL_READY)
