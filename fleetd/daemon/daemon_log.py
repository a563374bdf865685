"""The daemon's own log: one event per line, as JSON, or readable text on a terminal.

Invariants:
- The log goes to stderr, or to a file that SIGUSR1 reopens (after logrotate has moved it).
- A full disk or a closed pipe never stops the daemon: the line is lost, and counted.
- Records of the standard `logging` module are written in the same form, from WARNING up.
"""

from __future__ import annotations

import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import orjson

from fleetd.daemon.own_memory import with_rich, without_rich

if TYPE_CHECKING:
    from structlog.typing import FilteringBoundLogger

LEVELS = {"debug": logging.DEBUG, "info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


class LogSink:
    """Write whole lines to one descriptor. `path` None means stderr."""

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lost = 0
        self._fd = 2
        if path is not None:
            self._fd = self._open(path)

    @staticmethod
    def _open(path: Path) -> int:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)

    @property
    def is_terminal(self) -> bool:
        return self.path is None and os.isatty(2)

    def write(self, line: str) -> None:
        """Write one line; `line` has no newline at its end."""
        try:
            os.write(self._fd, line.encode("utf-8", "replace") + b"\n")
        except OSError:
            self.lost += 1

    def reopen(self) -> None:
        """Reopen the file. The old descriptor stays in use when that fails."""
        if self.path is None:
            return
        fd = self._open(self.path)
        old, self._fd = self._fd, fd
        os.close(old)

    def close(self) -> None:
        if self.path is not None:
            os.close(self._fd)
            self.path, self._fd = None, 2

    # The names that structlog calls on what a logger factory returns.
    msg = debug = info = warning = warn = error = critical = exception = fatal = write


class _LibraryHandler(logging.Handler):
    """Pass records of the standard logging module to structlog."""

    def __init__(self, log: FilteringBoundLogger) -> None:
        super().__init__(logging.WARNING)
        self._log = log

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = self._log.error if record.levelno >= logging.ERROR else self._log.warning
            log(record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:  # noqa: BLE001 - logging must not raise
            self.handleError(record)


def _json(_: Any, __: str, event: dict[str, Any]) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def set_up(sink: LogSink, level: str = "info") -> FilteringBoundLogger:
    """Configure structlog on `sink` and return the logger; `level` is in LEVELS."""
    terminal = sink.is_terminal
    if not terminal:
        without_rich()
    import structlog

    with_rich()
    if terminal:
        colors = not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        tail: list[Any] = [
            structlog.dev.ConsoleRenderer(colors=colors, exception_formatter=structlog.dev.plain_traceback)
        ]
    else:
        tail = [structlog.processors.format_exc_info, _json]
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="%H:%M:%S" if terminal else "iso", utc=not terminal, key="timestamp"),
            *tail,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(LEVELS[level]),
        logger_factory=lambda *_: sink,
        cache_logger_on_first_use=True,
    )
    log: FilteringBoundLogger = structlog.get_logger()
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
    root.addHandler(_LibraryHandler(log))
    root.setLevel(logging.WARNING)
    logging.captureWarnings(True)
    sys.excepthook = lambda kind, error, trace: log.critical("unexpected failure", exc_info=(kind, error, trace))
    return log
