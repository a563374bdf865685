"""State of all fake engines: allocated memory, slots, pacing, and the failures.

Invariants:
- Counters are exact: tests assert on `stats()`. One lock guards them.
- Failures are decided here (`begin_inference`, `tokens`), so that every API fails in the same places.
"""

# os.path, since pathlib would double the start-up time.
# ruff: noqa: PTH100, PTH118, PTH120

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from fake_http import Exchange, Gone

if TYPE_CHECKING:
    from argparse import Namespace


def log(line: str) -> None:
    """Write one line to stdout, at once and whole."""
    os.write(1, line.encode() + b"\n")


def hold(size: int) -> bytearray:
    """Allocate `size` bytes and touch every page."""
    memory = bytearray(size)
    for offset in range(0, size, 4096):
        memory[offset] = 1
    return memory


class State:
    """One fake server: its flags, its counters, its memory."""

    def __init__(self, args: Namespace) -> None:
        self.args = args
        self.lock = threading.Condition()
        self.requests = self.in_flight = self.max_in_flight = self.aborted = self.finished = 0
        self.waiting = 0
        self.busy: dict[str, int] = {}  # in flight by slot group: one per server, or one per model of a server
        self.epoch = 0  # rises when everything in flight is to be aborted
        self.memory: dict[str, bytearray] = {}
        self.workers: list[int] = []
        self.ready_at = time.monotonic()

    # -- life and death ------------------------------------------------------------------------------------------------

    def die(self, reason: str) -> None:
        """Crash the process as the flags ask; never returns."""
        log(f"fake: dying: {reason}")
        os._exit(0 if self.args.exit_zero_on_death else self.args.exit_code)

    def take(self, key: str, size: int) -> None:
        """Hold `size` bytes under `key`: in this process, or in a worker that outlives it."""
        if self.args.orphan_worker:
            self.workers.append(self.spawn_worker(size))
        elif size:
            self.memory[key] = hold(size)

    def release(self, key: str) -> None:
        self.memory.pop(key, None)

    def spawn_worker(self, size: int) -> int:
        """Start a child that survives our SIGKILL and keeps memory and stdout."""
        script = os.path.join(os.path.dirname(os.path.abspath(__file__)), "fake_worker.py")
        flags = [str(size), "1" if self.args.ignore_term else "0", "1" if self.args.orphan_setsid else "0"]
        read_end, write_end = os.pipe()
        os.set_inheritable(write_end, True)
        argv = [sys.executable, "-S", "-E", script, *flags, str(write_end)]
        pid = os.posix_spawn(sys.executable, argv, dict(os.environ))
        os.close(write_end)
        os.read(read_end, 1)
        os.close(read_end)
        return pid

    # -- inference -----------------------------------------------------------------------------------------------------

    def begin_inference(self, exchange: Exchange, group: str = "") -> int:
        """Count a request, apply faults, wait for a slot. Returns its number, from 1. Raises Gone."""
        with self.lock:
            self.requests += 1
            number = self.requests
        crash = self.args.crash_after_requests
        if crash is not None and number > crash and not self.args.crash_mid_stream:
            self.die(f"crash after {crash} requests")
        if self.args.hang_after is not None and number > self.args.hang_after:
            exchange.hang()
        if self.args.garbage:
            exchange.garbage()
        self._wait_for_slot(exchange, group)
        return number

    def _wait_for_slot(self, exchange: Exchange, group: str) -> None:
        with self.lock:
            self.waiting += 1
            try:
                while self.args.slots and self.busy.get(group, 0) >= self.args.slots:
                    self.lock.wait(0.02)
                    if exchange.client_gone():
                        self.aborted += 1
                        raise Gone
            finally:
                self.waiting -= 1
            self.in_flight += 1
            self.busy[group] = self.busy.get(group, 0) + 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)

    def end_inference(self, complete: bool, group: str = "") -> None:
        with self.lock:
            self.in_flight -= 1
            self.busy[group] -= 1
            if complete:
                self.finished += 1
            else:
                self.aborted += 1
            self.lock.notify_all()

    def tokens(self, exchange: Exchange, number: int, count: int) -> Iterator[str]:
        """Yield `count` words at the asked pace, breaking off as the flags say. Raises Gone when the client leaves."""
        epoch = self.epoch
        start = time.monotonic()
        crash = self.args.crash_after_requests
        for index in range(count):
            if self.args.tps:
                exchange.wait(max(0.0, start + (index + 1) / self.args.tps - time.monotonic()))
            if self.epoch != epoch:
                raise Aborted
            if index == max(1, count // 2) or count == 1:
                if self.args.rst_mid_stream and exchange.begun:
                    exchange.reset()
                if self.args.crash_mid_stream and crash is not None and number > crash:
                    self.die(f"crash in the middle of request {number}")
            yield f"word{index} "

    def stats(self) -> dict[str, Any]:
        with self.lock:
            return {
                "pid": os.getpid(),
                "requests": self.requests,
                "in_flight": self.in_flight,
                "max_in_flight": self.max_in_flight,
                "waiting": self.waiting,
                "finished": self.finished,
                "aborted": self.aborted,
                "held_bytes": sum(len(part) for part in self.memory.values()),
                "workers": list(self.workers),
            }


class Aborted(Exception):
    """The server itself broke off what was in flight."""
