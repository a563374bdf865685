"""One line on a terminal that says what fleetctl waits for, refreshed until the wait is over.

Invariants:
- Nothing is written into a pipe, and nothing before a moment has passed.
- A failure to ask the daemon never disturbs the wait: the line only keeps its clock.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from fleetd.cli.client import Client, CliError
from fleetd.cli.render import clean, duration, shorten, size
from fleetd.units import listed

PATIENCE_S = 1.0
PERIOD_S = 0.5
_NAMES_SHOWN = 3

Row = Mapping[str, Any]


@contextmanager
def progress(what: str, describe: Callable[[], str] | None = None, limit_s: float | None = None) -> Iterator[None]:
    """Show on a terminal what `describe` returns, with the elapsed time, while the block runs."""
    if not sys.stderr.isatty():
        yield
        return
    done = threading.Event()
    thread = threading.Thread(target=_show, args=(what, describe, limit_s, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join(PERIOD_S * 4)


def _show(what: str, describe: Callable[[], str] | None, limit_s: float | None, done: threading.Event) -> None:
    began, text, shown = time.monotonic(), "", False
    in_place = os.environ.get("TERM", "dumb") != "dumb"
    if done.wait(PATIENCE_S):
        return
    while True:
        if describe is not None:
            try:
                text = describe() or text
            except (CliError, OSError, ValueError, KeyError, TypeError):
                pass
        if done.is_set():
            break
        limit = f" of at most {duration(limit_s)}" if limit_s else ""
        line = f"{what}: {duration(round(time.monotonic() - began))}{limit}" + (f" · {clean(text)}" if text else "")
        if in_place:
            sys.stderr.write("\r\x1b[K" + shorten(_plain(line), _columns() - 1))
        elif not shown:
            sys.stderr.write(_plain(line) + " (Ctrl-C stops only the wait)\n")
        sys.stderr.flush()
        shown = True
        if done.wait(PERIOD_S):
            break
    if shown:
        clear_line()


def clear_line() -> None:
    """Remove the progress line before something else is written to the terminal."""
    if sys.stderr.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        sys.stderr.write("\r\x1b[K")
        sys.stderr.flush()


def _plain(text: str) -> str:
    encoding = (sys.stderr.encoding or "ascii").lower().replace("-", "")
    return text if encoding == "utf8" else text.replace("·", "-").replace("…", "~")


def _columns() -> int:
    try:
        return max(20, os.get_terminal_size(sys.stderr.fileno()).columns)
    except OSError:
        return 80


# -- what a wait is about -----------------------------------------------------------------------------------------------


def of_models(client: Client, names: Sequence[str]) -> Callable[[], str]:
    """Return a description of loads: for one model its engine's answer, memory, last load and limit."""

    def describe() -> str:
        if len(names) == 1 and not any(mark in names[0] for mark in "*?["):
            return model_text(client.get(f"/v1/models/{names[0]}")["model"])
        rows = client.get("/v1/status")["models"]
        return _several([row for row in rows if row.get("state") in ("LOADING", "UNLOADING")])

    return describe


def of_processes(client: Client, names: Sequence[str] = ()) -> Callable[[], str]:
    """Return a description of starts and stops; without names of all processes that move."""

    def describe() -> str:
        if len(names) == 1 and not any(mark in names[0] for mark in "*?["):
            row = client.get(f"/v1/processes/{names[0]}")["process"]
            return f"{row['state']}: {row.get('reason') or ''}"
        moving = ("STARTING", "STOPPING", "DRAINING", "BACKOFF", "BLOCKED")
        return _several([row for row in client.get("/v1/status")["processes"] if row.get("state") in moving])

    return describe


def of_shutdown(client: Client) -> Callable[[], str]:
    """Return a description of a shutdown: what still runs."""

    def describe() -> str:
        running = ("READY", "STARTING", "STOPPING", "DRAINING", "UNHEALTHY")
        return _several([row for row in client.get("/v1/status")["processes"] if row.get("state") in running])

    return describe


def model_text(row: Row) -> str:
    """Return how far the load of one model is."""
    loading = row.get("loading") or {}
    parts = [f"{row.get('state')}: {row.get('reason') or ''}"]
    if loading:
        parts = [str(loading.get("detail") or "loading")]
        if loading.get("rss_bytes") and loading.get("needs_bytes"):
            parts.append(f"{size(loading['rss_bytes'])} of {size(loading['needs_bytes'])}")
        if row.get("load_s"):
            parts.append(f"last load took {duration(row['load_s'])}")
        if loading.get("limit_s"):
            parts.append(f"limit {duration(loading['limit_s'])}")
    elif row.get("queued"):
        parts.append(f"{row['queued']} waiting")
    return ", ".join(parts)


def _several(rows: Sequence[Row]) -> str:
    return listed((f"{row.get('name')} {row.get('state')}" for row in rows), _NAMES_SHOWN)
