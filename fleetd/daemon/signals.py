"""Install the signal handlers of the daemon.

    SIGTERM, SIGINT   drain, stop everything in reverse order of dependency, exit 0; the second one forces
    SIGHUP            read fleet.yaml again
    SIGUSR1           reopen the daemon's own log

Invariants:
- Handlers run on the event loop, so they may dispatch events; nothing runs in the interpreter's signal context.
- A signal during a re-execution is kept by the kernel: the old program blocks it, the new one unblocks it.
- SIGPIPE and SIGTTOU never kill the daemon: a reader of its log may go away.
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
    """Block signals for the next program; earlier ones are handled on return."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _HANDLED)
    for _ in range(3):  # from the kernel's pipe to the loop, and from there to the handler
        await asyncio.sleep(0)


def install(loop: asyncio.AbstractEventLoop, actions: SignalActions) -> Callable[[], None]:
    """Install the handlers on `loop`; return a function that removes them."""
    stops = 0

    def stop(name: str) -> None:
        nonlocal stops
        stops += 1
        actions.stop(stops > 1, name)

    handlers = (lambda: stop("SIGTERM"), lambda: stop("SIGINT"), actions.reload, actions.reopen)
    for number, handler in zip(_HANDLED, handlers, strict=True):
        loop.add_signal_handler(number, handler)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _HANDLED)
    former = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGPIPE, signal.SIGTTOU)}

    def remove() -> None:
        for number in _HANDLED:
            loop.remove_signal_handler(number)
        for number, handler in former.items():
            signal.signal(number, handler)

    return remove
