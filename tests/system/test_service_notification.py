"""Notifications to systemd, read from the socket that systemd would listen on."""

from __future__ import annotations

import signal
import socket
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from tests.support.daemon import Fleetd
from tests.support.waiting import until

FLEET = "services:\n  one: {command: [/bin/sleep, '86400']}\n"


class Notifications:
    """The notifications so far, one line each."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener = listener
        self.lines: list[str] = []

    def read(self) -> list[str]:
        while True:
            try:
                self.lines += self._listener.recv(4096).decode().splitlines()
            except BlockingIOError:
                return self.lines

    def has(self, line: str) -> bool:
        return line in self.read()


@contextmanager
def notified(folder: Path, **env: str) -> Iterator[tuple[Fleetd, Notifications]]:
    with (
        tempfile.TemporaryDirectory(prefix="fd-") as short,
        socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener,
    ):
        listener.bind(f"{short}/notify")
        listener.setblocking(False)
        env |= {"NOTIFY_SOCKET": f"{short}/notify", "BLACK_BOX_FOLDER": str(folder)}
        with Fleetd(folder, FLEET, env) as daemon:
            yield daemon, Notifications(listener)


def test_start_reload_and_stop(tmp_path: Path) -> None:
    with notified(tmp_path) as (daemon, systemd):
        daemon.start()
        until(lambda: systemd.has("READY=1"), "it reports that it is ready")
        assert systemd.has("STATUS=1 process, 0 models")
        systemd.lines.clear()
        daemon.signal(signal.SIGHUP)
        until(lambda: systemd.has("READY=1"), "it reports that the reload is done")
        assert systemd.lines[0] == "RELOADING=1"
        assert "STOPPING=1" not in systemd.lines
        assert daemon.stop() == 0
        assert systemd.has("STOPPING=1")


def test_reexec_notifies_a_reload_and_not_a_stop(tmp_path: Path) -> None:
    with notified(tmp_path, WATCHDOG_USEC="400000") as (daemon, systemd):
        daemon.start()
        until(lambda: systemd.has("READY=1"), "it reports that it is ready")
        systemd.lines.clear()
        assert daemon.control("POST", "/v1/reexec", {}).status == 202
        until(lambda: systemd.has("READY=1"), "the new program reports that it is ready")
        assert "RELOADING=1" in systemd.lines
        assert "STOPPING=1" not in systemd.lines, "systemd would wait for the end of this PID, and kill it in the end"
        systemd.lines.clear()
        until(lambda: systemd.has("WATCHDOG=1"), "the new program feeds the watchdog")


def test_reexec_is_refused_with_an_invalid_file(tmp_path: Path) -> None:
    with notified(tmp_path) as (daemon, _):
        daemon.start()
        row = daemon.until_state("one", "READY")
        daemon.write(FLEET + "  one: {}\n")
        answer = daemon.control("POST", "/v1/reexec", {})
        assert answer.status == 422, answer.body
        assert answer.json["error"]["code"] == "invalid_config"
        assert daemon.is_up()
        assert daemon.process_row("one")["pid"] == row["pid"]


def test_concurrent_reloads_wait_for_one_another(tmp_path: Path) -> None:
    with notified(tmp_path) as (daemon, _), ThreadPoolExecutor(8) as pool:
        daemon.start()
        row = daemon.until_state("one", "READY")
        for number in range(3):
            daemon.write(FLEET + f"  more-{number}: {{command: [/bin/sleep, '86400']}}\n")
            answers = list(pool.map(lambda _: daemon.control("POST", "/v1/reload", {}), range(8)))
            assert [answer.status for answer in answers] == [200] * 8, [answer.body for answer in answers]
        daemon.until_state("more-2", "READY")
        assert {process["name"] for process in daemon.status()["processes"]} == {"more-2", "one"}
        assert daemon.process_row("one")["pid"] == row["pid"]
