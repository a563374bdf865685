"""The exception tree, split by who can act on it.

    FleetError                 everything fleetd raises on purpose
     ├─ ConfigError            the author of fleet.yaml: carries every problem found, with its place
     ├─ EngineError            the engine or its model: a start, load or unload that did not work
     ├─ CapacityError          the budget: does not fit, now or ever
     ├─ HostError              the machine: spawn failed, port taken, disk full, permission
     ├─ ApiError               the caller of an API: status, stable code, Retry-After
     └─ InvalidTransition      a bug of ours: a state moved in a way the table does not know

`hint` is one sentence that states what to do; `recoverable` is whether a retry can help.
Any other exception that escapes is a bug to report.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path


class FleetError(Exception):
    """Base of the tree. `str(error)` is one full sentence for a person."""

    recoverable: bool = False

    def __init__(self, message: str, *, hint: str | None = None, recoverable: bool | None = None) -> None:
        super().__init__(message)
        self.hint = hint
        if recoverable is not None:
            self.recoverable = recoverable

    @property
    def sentence(self) -> str:
        """The error with its hint, as one line."""
        return f"{self} ({self.hint})" if self.hint else str(self)


@dataclass(frozen=True, slots=True)
class Problem:
    """One mistake in a file. Lines and columns count from 1; 0 means unknown."""

    file: str
    line: int
    column: int
    path: str
    message: str
    excerpt: str = ""
    caret: int = 0  # the column of the place in the excerpt

    @property
    def headline(self) -> str:
        """The place and the message, without the excerpt."""
        where = f"{self.file}:{self.line}:{self.column}: " if self.line else f"{self.file}: "
        subject = f"{self.path}: " if self.path else ""
        return f"{where}{subject}{self.message}"

    def __str__(self) -> str:
        if not self.excerpt:
            return self.headline
        return f"{self.headline}\n    {self.excerpt}\n    {' ' * max(0, self.caret - 1)}^"


class ConfigError(FleetError):
    """fleet.yaml is invalid: all problems in file order, and all its `files`."""

    def __init__(self, problems: Sequence[Problem], *, hint: str | None = None, files: Iterable[Path] = ()) -> None:
        self.problems = tuple(problems)
        self.files = tuple(files)
        super().__init__("\n".join(str(problem) for problem in self.problems), hint=hint)


class EngineError(FleetError):
    """An engine failed. `recoverable` False: only an edit of fleet.yaml helps.

    `key` is the key of the entry that it is about, where one is: `options.api_key`, or `command` for the program itself.
    """

    recoverable = True

    def __init__(
        self, message: str, *, hint: str | None = None, recoverable: bool | None = None, key: str | None = None
    ) -> None:
        super().__init__(message, hint=hint, recoverable=recoverable)
        self.key = key


class CapacityError(FleetError):
    """It does not fit into the budget; the message has the numbers."""


class HostError(FleetError):
    """The machine refused: spawn, port, disk, permission."""

    recoverable = True


class ApiError(FleetError):
    """An answer to an API caller that is not success."""

    def __init__(
        self,
        status: int,
        code: str,
        message: str,
        *,
        retry_after_s: float | None = None,
        should_retry: bool | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message, hint=hint)
        self.status = status
        self.code = code
        self.retry_after_s = retry_after_s
        self.should_retry = should_retry


class InvalidTransition(FleetError):
    """A bug: a state change outside the table. Carries the story of what led here."""

    def __init__(self, subject: str, start: str, finish: str, story: Sequence[str] = ()) -> None:
        self.subject, self.start, self.finish, self.story = subject, start, finish, tuple(story)
        lines = "".join(f"\n  {line}" for line in self.story)
        super().__init__(f"{subject} cannot move from {start} to {finish}{lines}")


def in_words(error: Exception) -> str:
    """Return what went wrong with a connection, without the HTTP library's account."""
    cause = getattr(error, "os_error", None)
    if (
        isinstance(cause, OSError) and cause.errno and type(cause).__module__ == "builtins"
    ):  # not TLS, not a name's lookup
        return os.strerror(cause.errno)
    return str(error) or type(error).__name__
