"""The environment that an entry gives its process, and the files that some of it comes from.

The rules of this file
- Later wins: the files in their order, `env`, and last what fleetd says of the process.
- An absent file is no mistake of fleet.yaml: its process is BLOCKED until the file is there. What is there and cannot be read is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fleetd.config.load import LoadedConfig
from fleetd.config.marks import Path_, path_text
from fleetd.daemon.entries import Entry
from fleetd.daemon.environment import parse_env_file, substitute
from fleetd.errors import Problem

_LIMIT_BYTES = 1024 * 1024
Variables = Mapping[str, str]


@dataclass(frozen=True, slots=True)
class EnvSource:
    """What an environment with files is made from, so that it can be made again. `files`: absolute path → key of fleet.yaml."""

    files: Mapping[str, str]
    env: Variables
    places: Mapping[str, object]
    numbered: bool

    def made(self, contents: Iterable[Variables]) -> dict[str, str]:
        """Return the environment, given what the files say."""
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
class OwnEnvironment:
    """What an entry sets. `source` is None where no file is named; `absent` are the files that could not be read yet."""

    values: dict[str, str]
    source: EnvSource | None = None
    absent: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Mistakes:
    """What is wrong with a file that is there: in general, or of its lines."""

    general: str | None = None
    lines: tuple[tuple[int, str], ...] = ()


def read_env_file(path: Path) -> tuple[Variables, Mistakes] | None:
    """Return what a file says, and what is wrong with it; None where there is none. Blocks."""
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


class EnvFiles:
    """The files of one configuration, each read once. `problem` and `warn` take a place of fleet.yaml and what is to say."""

    def __init__(
        self,
        loaded: LoadedConfig,
        problem: Callable[[Path_, str], None],
        warn: Callable[[Path_, str], None],
        elsewhere: Callable[[Problem], None],
    ) -> None:
        self._loaded = loaded
        self._problem, self._warn, self._elsewhere = problem, warn, elsewhere
        self._read: dict[Path, Variables | None] = {}

    def environment(self, entry: Entry, places: Mapping[str, object]) -> OwnEnvironment:
        """Return what an entry sets for its process."""
        files: dict[str, str] = {}
        absent: dict[str, str] = {}
        contents: list[Variables] = []
        for index, text in enumerate(entry.keys.env_file):
            path = self._loaded.resolve((*entry.path, "env_file"), text)
            where = (*entry.path, "env_file", index)
            files[str(path)] = path_text((*entry.path, "env_file"))
            content = self._content(path, where)
            if content is None:
                absent[str(path)] = files[str(path)]
                self._warn(where, f"{path} is not there: {entry.name} stays BLOCKED until it is")
            else:
                contents.append(content)
        source = EnvSource(files, entry.keys.env, places, entry.keys.replicas > 1 or entry.port is not None)
        return OwnEnvironment(source.made(contents), source if files else None, absent)

    def _content(self, path: Path, where: Path_) -> Variables | None:
        if path not in self._read:
            self._read[path] = self._told(path, where)
        return self._read[path]

    def _told(self, path: Path, where: Path_) -> Variables | None:
        found = read_env_file(path)
        if found is None:
            return None
        content, mistakes = found
        if mistakes.general is not None:
            self._problem(where, mistakes.general)
        for line, message in mistakes.lines:
            self._elsewhere(Problem(str(path), line, 1, "", message))
        return content
