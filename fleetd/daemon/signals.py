"""What the daemon does on a signal.

    SIGTERM, SIGINT   drain, stop everything in reverse order of dependency, exit 0; the second one forces
    SIGHUP            read fleet.yaml again
    SIGUSR1           open the daemon's own log again

The rules of this file
- Handlers run on the event loop, so they may dispatch events; nothing happens in the interpreter's signal context.
- SIGPIPE and SIGTTOU are never a reason to die: a log reader that went away is not.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class SignalActions:
    """`stop(force, signal name)`, `reload()`, `reopen()`."""

    stop: Callable[[bool, str], None]
    reload: Callable[[], None]
    reopen: Callable[[], None]


def install(loop: asyncio.AbstractEventLoop, actions: SignalActions) -> Callable[[], None]:
    """Install the handlers on `loop`; return what takes them away again."""
    asked = 0

    def stop(name: str) -> None:
        nonlocal asked
        asked += 1
        actions.stop(asked > 1, name)

    handlers: dict[signal.Signals, Callable[[], None]] = {
        signal.SIGTERM: lambda: stop("SIGTERM"),
        signal.SIGINT: lambda: stop("SIGINT"),
        signal.SIGHUP: actions.reload,
        signal.SIGUSR1: actions.reopen,
    }
    for number, handler in handlers.items():
        loop.add_signal_handler(number, handler)
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGPIPE, signal.SIGTTOU)}

    def remove() -> None:
        for number in handlers:
            loop.remove_signal_handler(number)
        for number, handler in kept.items():
            signal.signal(number, handler)

    return remove
