"""The contract between fleetd and an engine: the values they exchange and the protocols an engine implements.

An engine is a module-level object `ENGINE` with the members of `Engine`. `launch`, `probes`, `estimate`, `classify_exit`,
`validate`, `api` and `concurrency` are pure: they read their arguments (and, for `estimate` and `validate`, file headers).
Abilities that not every engine has are typed objects, each None where the engine has none: `server` (load and unload models in
a running process), `sleep` (release memory and keep the process), `store` (build models before they are loaded) and
`startup` (read the log of a start). `fleetd/engines/README.md` shows how to write one.

Invariants:
- An engine imports neither another engine nor the core, the host or the daemon.
- Coroutines get the HTTP client as an argument and keep no state between calls.
- Sizes are bytes, durations are seconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes
from fleetd.errors import EngineError
from fleetd.units import expand_home

if TYPE_CHECKING:
    import asyncio

    from aiohttp import ClientSession

    from fleetd.engines.options import Options
    from fleetd.models.ollama.api import Progress
    from fleetd.models.ollama.modelfile import ModelRecipe
    from fleetd.models.ollama.sync import Library


class Api(StrEnum):
    """The dialect that an engine speaks on its port."""

    OPENAI = "openai"
    OLLAMA = "ollama"  # the native API of Ollama; it serves the OpenAI routes too
    NONE = "none"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """The address of a server. `base_url` has no trailing slash."""

    base_url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One entry of `models` in fleet.yaml, as the engine that serves it sees it."""

    name: str
    served_as: str  # the server's own name for it
    source: str | None = None  # models.NAME.from
    quantize: str | None = None
    modelfile: Mapping[str, Any] = field(default_factory=dict)
    embedding: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)  # models.NAME.options: arguments of a load


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """Everything an engine needs to write a command line.

    `command` is the user's own; empty means the engine's default. `args` come last on the command line. `config_dir` is the
    folder of the file that defines the entry: relative paths in options are resolved against it.
    """

    name: str
    options: Options
    host: str
    port: int | None
    replica: int = 1
    command: tuple[str, ...] = ()
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    config_dir: Path = Path(".")
    device: str | None = None
    device_uuid: str | None = None
    device_total_bytes: int | None = None  # None: unknown
    served_as: str = ""
    models: tuple[ServedModel, ...] = ()  # the models that a server of many models will be asked to load
    learned: Mapping[str, int] = field(default_factory=dict)  # `StartupLog.learned` of an earlier start
    external: bool = False  # the server is not started by fleetd

    def resolve(self, path: str) -> Path:
        """Return a path of the options as an absolute path; `~` is expanded."""
        return _joined(self.config_dir, expand_home(path)).absolute()


@dataclass(frozen=True, slots=True)
class Launch:
    """A complete command line; `env` is only the engine's part of the environment.

    `requires` are paths that must exist before a start; the process is BLOCKED until they do. `named` maps a required path to
    the option that names it: path → `mmproj`, `lora[0]`. The values of the variables in `secret_env` are never shown.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unset_env: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    secret_env: frozenset[str] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExitVerdict:
    """Why a process exited; `reason` adds to code and signal, and may be empty."""

    kind: ExitKind  # the restart policy reads it
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model in a server's memory; `context_length` in tokens, None: not reported."""

    served_as: str
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class SleepRecord:
    """The state that a wake needs. The daemon stores it, also across its own restarts."""

    level: int
    canary: str | None = None  # the engine's answer to a fixed prompt, from before its first sleep


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """The result of one probe. `key`: the key at fault; `final`: retrying cannot help."""

    ok: bool
    detail: str = ""
    key: str | None = None
    final: bool = False
    asleep: bool = False  # the server sleeps, so no token was requested

    @classmethod
    def failed(cls, error: EngineError) -> ProbeOutcome:
        """Return the outcome of a probe that raised."""
        return cls(False, str(error), error.key, not error.recoverable)


@dataclass(frozen=True, slots=True)
class OptionProblem:
    """One mistake in an entry that the types of its options cannot express.

    `path` is below `options`, e.g. ("model",). A path that begins with env, args or command is below the entry, and
    ("models", NAME, …) is below the model that the server serves. A `warning` does not reject the configuration.
    """

    path: tuple[str | int, ...]
    message: str
    warning: bool = False


class ModelServer(Protocol):
    """Loads models; required exactly where `Capabilities.many_models` is set."""

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Load a model and return its measured bytes per device, empty if unknown.

        The device "gpu" means the entry's own device. Raises EngineError.
        """

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: ServedModel, timeout_s: float) -> None:
        """Unload a model; return when the server no longer lists it. Raises EngineError."""

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return the models in memory. Raises EngineError."""

    def canonical_name(self, served_as: str) -> str:
        """Return how `loaded` names a model that fleet.yaml calls `served_as`."""


class Sleeper(Protocol):
    """Makes a process release its memory and stay. After any error it is killed."""

    def can_sleep(self, options: Options) -> bool:
        """Return whether a process with these options can sleep."""

    def asleep_bytes(self, context: LaunchContext, awake: Mapping[str, int]) -> Mapping[str, int] | None:
        """Return the bytes per device asleep, given those awake; None: unknown."""

    async def sleep(
        self, http: ClientSession, endpoint: Endpoint, options: Options, before: SleepRecord | None, timeout_s: float
    ) -> SleepRecord:
        """Put it to sleep; `before` is from an earlier sleep. Raises EngineError."""

    async def wake(self, http: ClientSession, endpoint: Endpoint, before: SleepRecord, timeout_s: float) -> None:
        """Wake the server and verify it with one real request. Raises EngineError."""

    async def is_asleep(self, http: ClientSession, endpoint: Endpoint, timeout_s: float) -> bool:
        """Return whether the server sleeps. Raises EngineError."""


class ModelStore(Protocol):
    """Builds models in a server's store before they are loaded.

    A model is built from `from`, `quantize` and `modelfile` of fleet.yaml.
    `state_dir` is the daemon's state folder, where the record of built models is kept.
    """

    def key(self, context: LaunchContext, endpoint: Endpoint) -> str:
        """Return a string that is equal for servers with one store. Blocks on files."""

    def library(self, http: ClientSession, endpoint: Endpoint, context: LaunchContext, state_dir: Path) -> Library:
        """Return the content of the server's store, to compare and to change it."""

    def recipe(self, context: LaunchContext, model: ServedModel) -> ModelRecipe:
        """Return how to build a model. Raises EngineError with every mistake of its entry."""

    def lock(self, key: str) -> asyncio.Lock:
        """Return the lock of a store; hold it while building or deleting anything in it."""

    def has_copy(self, context: LaunchContext, endpoint: Endpoint | None, model: ServedModel, state_dir: Path) -> bool:
        """Return whether the store has the bytes of the model. Blocks on files."""

    async def build(
        self, http: ClientSession, endpoint: Endpoint, context: LaunchContext, model: ServedModel, *,
        state_dir: Path, progress: Progress | None = None,
    ) -> str | None:  # fmt: skip
        """Build the model unless the store has it as fleet.yaml describes it.

        Returns a sentence if something was built, else None. Raises EngineError; recoverable where only a drive is missing.
        """


class StartupLog(Protocol):
    """Reads the log of a start: progress, and measurements for the next start."""

    def phase(self, line: str) -> str | None:
        """Return the phase that a line reports, which extends the deadline; None: none."""

    def learned(self, context: LaunchContext, lines: Sequence[str]) -> Mapping[str, int]:
        """Return the next start's `LaunchContext.learned`; empty: none."""


class Engine(Protocol):
    """The contract of an engine, which the registry checks when it loads one."""

    @property
    def name(self) -> str:
        """The value of `engine:` in fleet.yaml."""

    @property
    def capabilities(self) -> Capabilities:
        """What every process can do; `capabilities_of` adds what options enable."""

    @property
    def options(self) -> type[Options]:
        """The pydantic model of `options:`, loaded lazily where pydantic is not needed."""

    @property
    def server(self) -> ModelServer | None:
        """Loads and unloads models; None: the process is the model."""

    @property
    def sleep(self) -> Sleeper | None:
        """Puts the process to sleep; None: it cannot sleep."""

    @property
    def store(self) -> ModelStore | None:
        """Builds models; None: the server has no store that fleetd can change."""

    @property
    def startup(self) -> StartupLog | None:
        """Reads the log of a start; None: it has nothing to report."""

    def api(self, options: Options) -> Api:
        """Return the dialect that a server with these options speaks."""

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        """Return the mistakes beyond types: conflicting options, keys of `env` set twice."""

    def launch(self, context: LaunchContext) -> Launch:
        """Return the command line and environment. Raises EngineError without a program."""

    def probes(self, options: Options) -> Probes:
        """Return the default probes; fleet.yaml can override each one."""

    def concurrency(self, options: Options) -> int:
        """Return how many requests one server processes at once."""

    def estimate(self, context: LaunchContext, model: ServedModel | None) -> Footprint | None:
        """Return bytes per device of the process (no model) or a model; None: unknown.

        Raises EngineError with the key of the model that names an unusable file.
        """

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        """Return why it exited, from code or signal (both None: unknown) and last lines."""

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: ServedModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Request one real token. Never causes a load; does not raise EngineError."""


@lru_cache(64)  # a fleet of thousands of entries names the same few paths again and again
def _joined(folder: Path, path: str) -> Path:
    return folder / path


def capabilities_of(engine: Engine, options: Options) -> Capabilities:
    """Return the capabilities of the engine with these options."""
    if engine.sleep is None:
        return engine.capabilities
    return replace(engine.capabilities, can_sleep=engine.sleep.can_sleep(options))
