"""What an engine is: one file with an options model, a capability record, a few pure functions, and awaits where a flag says so.

The rules of this file
- Pure: `launch`, `estimate`, `probes`, `classify_exit`, `validate`. They read only their arguments (and, for `estimate`, file headers).
- Awaiting: `load`, `unload`, `loaded`, `alive`. They get an aiohttp-like client injected and never keep state.
- May be there: `phase(line)` says how far a start has come, `learned_at_start(lines)` what its log is worth for the next one,
  `canonical_name`, `prepare`, `capabilities_for(options)` where one entry can more than another, and all of `Sleeper` where those
  capabilities say `can_sleep`.
- An engine never imports another engine, the host or the daemon.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

from fleetd.core.data.specs import Capabilities, ExitKind, Footprint, Probes
from fleetd.errors import EngineError

if TYPE_CHECKING:
    from aiohttp import ClientSession

    from fleetd.engines.options import Options as Options  # noqa: PLC0414 - engines import it from here


class Api(StrEnum):
    """The dialect an engine speaks on its port."""

    OPENAI = "openai"
    OLLAMA = "ollama"  # Ollama speaks OpenAI's too; this says that the native one is there
    NONE = "none"


def __getattr__(name: str) -> Any:
    """Load `Options`, the base of every engine's typed options, only for an engine that has some."""
    if name == "Options":
        from fleetd.engines.options import Options

        return Options
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Where a server listens. `base_url` has no trailing slash."""

    base_url: str
    api_key: str | None = None


@dataclass(frozen=True, slots=True)
class HeldModel:
    """A model that a many-model server is asked to hold: what `models.NAME` says about it."""

    name: str
    served_as: str
    source: str | None = None  # models.NAME.from
    quantize: str | None = None
    modelfile: Mapping[str, Any] = field(default_factory=dict)
    embedding: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """What an engine needs to write a command line.

    `command` is the user's own (empty: the engine's default). `args` come last on the command line. `config_dir` is the
    folder of the file that defined the entry: relative paths of options are resolved against it. `device_total_bytes`
    gives the size of the entry's device, where it is known.
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
    device_total_bytes: int | None = None
    served_as: str = ""
    models: tuple[HeldModel, ...] = ()  # what a many-model server will be asked to hold
    learned: Mapping[str, int] = field(default_factory=dict)  # what an earlier start of the same entry found out
    external: bool = False  # a server that is not ours to start


@dataclass(frozen=True, slots=True)
class Launch:
    """An exact command line. `env` is what the engine sets; the daemon adds the inherited part and the user's `env`.

    `requires` are paths that must exist before a start (BLOCKED until then); `secret_env` names variables whose values are
    never shown. `named` says which option names a required path: path → `mmproj`, `lora[0]`.
    """

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unset_env: tuple[str, ...] = ()
    requires: tuple[str, ...] = ()
    secret_env: frozenset[str] = frozenset()
    named: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class ExitVerdict:
    """The engine's view of an exit. `reason` holds only what the exit code and the signal do not say; it may be empty."""

    kind: ExitKind
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Resident:
    """A model that a server holds now; `served_as` is the server's own name for it. `context_length` None: it does not say."""

    served_as: str
    device_bytes: Mapping[str, int] = field(default_factory=dict)
    context_length: int | None = None


@dataclass(frozen=True, slots=True)
class Asleep:
    """What has to be known to wake a sleeper. The daemon keeps it in between, over its own restarts too."""

    level: int
    said: str | None = None  # its answer to the canary, from before its first sleep


@dataclass(frozen=True, slots=True)
class ProbeOutcome:
    """What a look at a server brought. `key` is the key of the entry that a failure is about; `final` that waiting cannot help."""

    ok: bool
    detail: str = ""
    key: str | None = None
    final: bool = False
    asleep: bool = False  # it was not asked for a token, since it sleeps

    @classmethod
    def failed(cls, error: EngineError) -> ProbeOutcome:
        return cls(False, str(error), error.key, not error.recoverable)


@dataclass(frozen=True, slots=True)
class OptionProblem:
    """One mistake in an entry's options that the types cannot see. `path` is below `options`, e.g. ("model",); one that begins
    with env, args or command is below the entry, and ("models", NAME, …) is of a model that the server shall hold.

    A `warning` is worth saying and stops nothing: an option without effect, a folder that is absent now.
    """

    path: tuple[str | int, ...]
    message: str
    warning: bool = False


class Sleeper(Protocol):
    """What an engine has besides, where its process can sleep. After an error of any of these the process is killed."""

    def asleep(self, context: LaunchContext, awake: Mapping[str, int]) -> Mapping[str, int] | None:
        """Return the bytes per device that it holds asleep, given what it takes awake; None: that cannot be said."""

    async def sleep(
        self, http: ClientSession, endpoint: Endpoint, options: Any, before: Asleep | None, timeout_s: float
    ) -> Asleep:
        """Put an idle server to sleep. `before`: what an earlier sleep of this run returned. Raises EngineError."""

    async def wake(self, http: ClientSession, endpoint: Endpoint, before: Asleep, timeout_s: float) -> None:
        """Wake it, and hear it speak. Raises EngineError."""

    async def sleeping(self, http: ClientSession, endpoint: Endpoint, timeout_s: float) -> bool:
        """Return whether it sleeps. Raises EngineError."""


def capabilities_of(engine: Engine, options: Any) -> Capabilities:
    """Return what one entry can: what its engine can, or what the engine says of these options."""
    of_options = getattr(engine, "capabilities_for", None)
    return engine.capabilities if of_options is None else cast("Capabilities", of_options(options))


class Engine(Protocol):
    """The contract of an engine. `fleetd/engines/__init__.py` finds it by module name or entry point."""

    name: str
    capabilities: Capabilities

    @property
    def options(self) -> type[Options]:
        """The model that `options` of fleet.yaml are checked by."""

    def api(self, options: Any) -> Api:
        """Return the dialect that a server with these options speaks."""

    def validate(self, context: LaunchContext) -> Sequence[OptionProblem]:
        """Return what is wrong beyond types: an option that excludes another, an env key that an option sets already."""

    def launch(self, context: LaunchContext) -> Launch:
        """Return the exact command line and environment. Raises EngineError when the program cannot be found."""

    def probes(self, options: Any) -> Probes:
        """Return the default probes; fleet.yaml overrides each one."""

    def concurrency(self, options: Any) -> int:
        """Return the number of requests one server works on at once."""

    def estimate(self, context: LaunchContext, model: HeldModel | None) -> Footprint | None:
        """Return the bytes per device of this process' model (`model` None) or of one held model; None: cannot tell.

        Raises EngineError with the key of the model that names an unusable file.
        """

    def classify_exit(self, code: int | None, signal: str | None, log_tail: Sequence[str]) -> ExitVerdict:
        """Say why it ended, from the exit code and the last log lines."""

    async def load(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float
    ) -> Mapping[str, int]:
        """Load a model into a many-model server; returns measured bytes per device, empty if unknown. Raises EngineError."""

    async def unload(self, http: ClientSession, endpoint: Endpoint, model: HeldModel, timeout_s: float) -> None:
        """Unload, and return only when the server no longer holds it. Raises EngineError."""

    async def loaded(self, http: ClientSession, endpoint: Endpoint) -> Sequence[Resident]:
        """Return what a many-model server holds now. Raises EngineError."""

    async def alive(
        self, http: ClientSession, endpoint: Endpoint, model: HeldModel | None, timeout_s: float
    ) -> ProbeOutcome:
        """Do a real one-token request: the only proof that a server still works."""
