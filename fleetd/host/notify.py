"""Notify systemd of the daemon's state (sd_notify); children do not inherit the variables.

Invariants:
- The notifier removes the variables from the environment; `environment` returns them for an execv.
- Sending never blocks and never fails: without systemd every call is a no-op.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import MutableMapping

_VARIABLES = ("NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID")


class Notifier:
    """The sd_notify protocol. `watchdog_interval_s` None: systemd expects no watchdog."""

    def __init__(self, environ: MutableMapping[str, str] | None = None) -> None:
        source = os.environ if environ is None else environ
        self.environment = {key: source.pop(key) for key in _VARIABLES if key in source}
        address = self.environment.get("NOTIFY_SOCKET", "")
        self._address = (
            ("\0" + address[1:] if address.startswith("@") else address) if address[:1] in ("@", "/") else ""
        )
        self._socket: socket.socket | None = None
        self.watchdog_interval_s = self._interval()

    @property
    def enabled(self) -> bool:
        return bool(self._address)

    def _interval(self) -> float | None:
        try:
            microseconds = int(self.environment.get("WATCHDOG_USEC", ""))
        except ValueError:
            return None
        wanted = self.environment.get("WATCHDOG_PID")
        if microseconds <= 0 or wanted not in (None, str(os.getpid())):
            return None
        return microseconds / 2_000_000

    def ready(self, status: str = "") -> None:
        """Report that start-up or a reload is complete."""
        self._send("READY=1", *_status(status))

    def reloading(self) -> None:
        """Report the start of a reload; `ready` reports its end."""
        self._send("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")

    def stopping(self, status: str = "") -> None:
        self._send("STOPPING=1", *_status(status))

    def status(self, text: str) -> None:
        """Set the line that `systemctl status` shows."""
        self._send(*_status(text))

    def watchdog(self) -> None:
        """Feed the watchdog. Call it from the loop."""
        self._send("WATCHDOG=1")

    def extend(self, seconds: float) -> None:
        """Ask for more time to start, reload or stop, counted from now."""
        self._send(f"EXTEND_TIMEOUT_USEC={max(1, int(seconds * 1_000_000))}")

    def _send(self, *lines: str) -> None:
        if not self._address or not lines:
            return
        try:
            if self._socket is None:
                self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
                self._socket.setblocking(False)
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError:
            return

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _status(text: str) -> tuple[str, ...]:
    return (f"STATUS={' '.join(text.split())[:500]}",) if text.strip() else ()
