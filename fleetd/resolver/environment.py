"""The environment of a process: inherited variables, env files, the entry, and which values are secret.

Invariants:
- A process inherits the daemon's environment without the variables for the daemon alone: systemd's sockets and watchdog,
  and everything that begins with FLEETD_.
- Later wins: inherited, engine, env_file, env, and last fleetd's own (PORT, FLEETD_NAME, FLEETD_REPLICA).
- `{port} {host} {name} {replica}` are replaced by the process' own; every other brace stays as it is.
- A value whose name looks like a secret is never shown, wherever it was set.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fleetd.config.secrets import HIDDEN, is_secret
from fleetd.host.types import NEVER_INHERITED

_CREDENTIAL_URL = re.compile(r"(?<=://)[^/@\s:]+:[^/@\s]+(?=@)")
_PLACE = re.compile(r"\{(port|host|name|replica)\}")
_LINE = re.compile(r"^(?:export\s+)?([A-Za-z_][A-Za-z0-9_.]*)\s*=\s*(.*)$")
_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", '"': '"', "\\": "\\", "$": "$", "`": "`"}
_LIMIT_BYTES = 1024 * 1024

Variables = Mapping[str, str]


def inherited(parent: Mapping[str, str]) -> dict[str, str]:
    """Return the part of the daemon's environment that a child inherits."""
    return {key: value for key, value in parent.items() if key not in NEVER_INHERITED and not key.startswith("FLEETD_")}


def substitute(text: str, places: Mapping[str, object]) -> str:
    """Replace `{port}` and the other placeholders; one without a value stays as it is."""
    if "{" not in text:
        return text
    return _PLACE.sub(lambda match: str(places[match[1]]) if places.get(match[1]) is not None else match[0], text)


def mentions_port(texts: Sequence[str]) -> bool:
    """Return whether any text contains the placeholder of the process' port."""
    return any("{port}" in text for text in texts)


def redacted_env(env: Mapping[str, str], secret: Collection[str] = ()) -> dict[str, str]:
    """Return `env` with secrets redacted."""
    return {
        key: HIDDEN if value and (key in secret or is_secret(key)) else _CREDENTIAL_URL.sub(HIDDEN, value)
        for key, value in env.items()
    }


def redacted_argv(argv: Sequence[str], secrets: Collection[str] = ()) -> list[str]:
    """Return `argv` without secrets: by flag name, by known value, and in URLs."""
    shown: list[str] = []
    hide_next = False
    for word in argv:
        flag, equals, value = word.partition("=")
        if hide_next or word in secrets:
            shown.append(HIDDEN)
        elif equals and (_is_secret_flag(flag) or value in secrets):
            shown.append(f"{flag}={HIDDEN}")
        else:
            shown.append(_CREDENTIAL_URL.sub(HIDDEN, word))
        hide_next = not hide_next and not equals and _is_secret_flag(word)
    return shown


def _is_secret_flag(word: str) -> bool:
    return word.startswith("-") and is_secret(word)


def parse_env_file(text: str) -> tuple[dict[str, str], list[tuple[int, str]]]:
    """Return the variables of `KEY=value` lines, and (line, problem) for invalid ones.

    Comments, `export`, single quotes (taken literally), double quotes (with backslash escapes, over several lines).
    Nothing is expanded.
    """
    found: dict[str, str] = {}
    problems: list[tuple[int, str]] = []
    lines = enumerate(text.lstrip("\ufeff").splitlines(), start=1)
    for number, raw in lines:
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        match = _LINE.match(line)
        if match is None:
            problems.append((number, "expected NAME=value"))
            continue
        name, rest = match[1], match[2]
        if rest[:1] in ("'", '"'):
            value = _quoted(rest, lines)
            if value is None:
                problems.append((number, f"the quote of {name} is not closed"))
                continue
            found[name] = value
        else:
            found[name] = re.split(r"\s#", rest, maxsplit=1)[0].strip()
    return found, problems


def _quoted(rest: str, lines: Iterator[tuple[int, str]]) -> str | None:
    quote, body = rest[0], rest[1:]
    while True:
        end = _closing(body, quote)
        if end is not None:
            break
        following = next(lines, None)
        if following is None:
            return None
        body += "\n" + following[1]
    value = body[:end]
    if quote == "'":
        return value
    return re.sub(r"\\(.)", lambda match: _ESCAPES.get(match[1], match[0]), value, flags=re.DOTALL)


def _closing(body: str, quote: str) -> int | None:
    at = 0
    while at < len(body):
        if body[at] == "\\" and quote == '"':
            at += 2
            continue
        if body[at] == quote:
            return at
        at += 1
    return None


@dataclass(frozen=True, slots=True)
class EnvSource:
    """The sources of an environment, to build it again; `files`: path → key."""

    files: Mapping[str, str]
    env: Variables
    places: Mapping[str, object]
    numbered: bool

    def made(self, contents: Iterable[Variables]) -> dict[str, str]:
        """Return the environment for the given contents of the files."""
        env: dict[str, str] = {}
        for content in contents:
            env |= content
        env = {key: substitute(value, self.places) for key, value in {**env, **self.env}.items()}
        port = self.places["port"]
        if self.numbered:
            env.setdefault("FLEETD_REPLICA", str(self.places["replica"]))
        if port is not None:
            env.setdefault("PORT", str(port))
        env["FLEETD_NAME"] = str(self.places["name"])
        return env


@dataclass(frozen=True, slots=True)
class Mistakes:
    """The problems of an existing file: of the file, or of its lines."""

    general: str | None = None
    lines: tuple[tuple[int, str], ...] = ()


def read_env_file(path: Path) -> tuple[Variables, Mistakes] | None:
    """Return the variables and problems of a file; None if it does not exist. Blocks."""
    try:
        data = path.read_bytes()
        if len(data) > _LIMIT_BYTES:
            return {}, Mistakes(f"{path} is larger than 1 MiB: not an env file")
        found, lines = parse_env_file(data.decode("utf-8"))
    except UnicodeDecodeError:
        return {}, Mistakes(f"{path} is not text in UTF-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        return {}, Mistakes(f"{path} cannot be read: {error.strerror}")
    return found, Mistakes(lines=tuple(lines))
