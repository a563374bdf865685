"""What the daemon does on a signal.

    SIGTERM, SIGINT   drain, stop everything in reverse order of dependency, exit 0; the second one forces
    SIGHUP            read fleet.yaml again
    SIGUSR1           open the daemon's own log again

The rules of this file
- Handlers run on the event loop, so they may dispatch events; nothing happens in the interpreter's signal context.
- What comes while one program replaces another is kept by the kernel: blocked by the one, and let in by the next.
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


_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)


async def hold() -> None:
    """Let no more of them in: they wait for the program after the execv. What came already has been handled on return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    for _ in range(3):  # from the kernel's pipe to the loop, and from there to the handler
        await asyncio.sleep(0)


def install(loop: asyncio.AbstractEventLoop, actions: SignalActions) -> Callable[[], None]:
    """Install the handlers on `loop`; return what takes them away again."""
    asked = 0

    def stop(name: str) -> None:
        nonlocal asked
        asked += 1
        actions.stop(asked > 1, name)

    handlers = (lambda: stop("SIGTERM"), lambda: stop("SIGINT"), actions.reload, actions.reopen)
    for number, handler in zip(_HANDLED, handlers, strict=True):
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    kept = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGPIPE, signal.SIGTTOU)}

    def remove() -> None:
        for number in _HANDLED:
            loop.remove_signal_handler(number)
        for number, handler in kept.items():
            signal.signal(number, handler)

    return remove
