"""Launch plans: how each process is started, reached and stopped, next to the core's ProcessSpec.

Invariants:
- A plan is a value, replaced with every change of fleet.yaml; a running process keeps the plan that started it.
- The launch hash covers everything that only a restart can change. It excludes the daemon's inherited environment: a daemon
  started from another terminal must not restart the fleet.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fleetd.core.data.specs import Probes, ProcessKind
from fleetd.engines.base import Api, Endpoint, Engine, Launch, LaunchContext, ModelServer, ServedModel
from fleetd.engines.container import Contained
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.errors import FleetError
from fleetd.host.types import Execution, Program, SpawnRequest, StopPolicy
from fleetd.resolver.containers import ContainerRecipe
from fleetd.resolver.environment import EnvSource, inherited, redacted_argv, redacted_env

REMOVAL = "container_removal"  # in a record's `extra`
RESTARTS = "restarts"


@dataclass(frozen=True, slots=True)
class Schedule:
    """A cron schedule: five fields and a time zone (None: the machine's own)."""

    cron: str
    timezone: str | None = None


@dataclass(frozen=True, slots=True)
class WatchPlan:
    """A restart when `paths` change and are then quiet; `ignore` holds globs."""

    paths: tuple[Path, ...]
    ignore: tuple[str, ...] = ()
    debounce_s: float = 0.5


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """One process, ready to be started.

    `own_env` is what fleet.yaml and fleetd set, later than the engine's; `missing_program` says why no command line could be
    written when the file was read (it is tried again at every start). `endpoint` is None where there is no port.
    """

    name: str
    base: str
    kind: ProcessKind
    engine_name: str | None
    engine: Engine
    context: LaunchContext
    api: Api
    launch: Launch
    endpoint: Endpoint | None = None
    external: bool = False
    missing_program: str | None = None
    own_env: Mapping[str, str] = field(default_factory=dict)
    env_source: EnvSource | None = None  # set if it has env files
    unread: tuple[str, ...] = ()  # env files that did not exist; they are in `requires` too
    execution: Execution = Execution()
    pre_start: tuple[str, ...] = ()
    post_stop: tuple[str, ...] = ()
    stop: StopPolicy = StopPolicy()
    probes: Probes = Probes()
    requires: tuple[str, ...] = ()
    required_by: Mapping[str, str] = field(default_factory=dict)  # required path → the key of fleet.yaml that names it
    device: str = "host"
    held: Mapping[str, ServedModel] = field(default_factory=dict)
    own_model: ServedModel | None = None
    context_length: int | None = None  # tokens per request, as configured
    schedule: Schedule | None = None
    watch: WatchPlan | None = None
    recipe: ContainerRecipe | None = None  # where it runs in a container
    contained: Contained | None = None  # the container, once its client is there
    kept_hash: str | None = None  # hash of the original plan: values learned by an earlier start are in no hash
    source: tuple[str, int] = ("", 0)
    place: str = ""  # its entry in fleet.yaml: `models.tiny`

    @property
    def model_server(self) -> ModelServer | None:
        """The object that loads models; None: the process is the model.

        For an external server of one model it checks the list of models.
        """
        return self.engine.server or (LISTED_MODELS if self.external else None)

    def with_key(self, sentence: str, key: str | None) -> str:
        """Return a sentence with the key of fleet.yaml that it is about."""
        if key is None:
            return sentence
        if key.startswith("options.") and not hasattr(self.context.options, key.removeprefix("options.")):
            return f"{sentence} ({self.place}: the engine {self.engine_name} has no {key})"
        return f"{sentence} ({self.place}.{'external' if self.external and key == 'command' else key})"

    def error_text(self, error: FleetError) -> str:
        """Return the sentence of an error, with the key that it is about."""
        return self.with_key(error.sentence, getattr(error, "key", None))

    def environment(self, parent: Mapping[str, str]) -> dict[str, str]:
        """Return the whole environment of the process, given the daemon's own."""
        env = {key: value for key, value in inherited(parent).items() if key not in self.launch.unset_env}
        return env | self.set_env()

    def set_env(self) -> dict[str, str]:
        """Return the variables beyond the inherited part: the engine's, then the entry's."""
        env = {**self.launch.env, **self.own_env}
        on_command_line = self.contained.on_command_line if self.contained is not None else ()
        return {key: value for key, value in env.items() if key not in on_command_line} if on_command_line else env

    @property
    def has_channel(self) -> bool:
        """Return whether it gets the Node IPC channel, for a stop or a ready message."""
        startup = self.probes.startup
        return self.stop.message is not None or (startup is not None and startup.message is not None)

    def request(self, generation: int, parent: Mapping[str, str], restarts: int = 0) -> SpawnRequest:
        """Return the host's request to start it, with what a later daemon needs."""
        return SpawnRequest(
            name=self.name,
            generation=generation,
            program=Program(self.launch.argv, self.environment(parent), self.execution),
            host=self.context.host,
            port=self.context.port,
            ipc=self.has_channel,
            extra={"launch_hash": self.launch_hash(), RESTARTS: restarts, **self._kept_of_container()},
        )

    def _kept_of_container(self) -> dict[str, list[str]]:
        """Return the container's removal command, for a daemon with another fleet.yaml."""
        return {REMOVAL: list(self.contained.remove)} if self.contained is not None else {}

    def launch_hash(self) -> str:
        """Return a short hash of everything that only a restart can change."""
        if self.kept_hash is not None:
            return self.kept_hash
        run = self.execution
        parts = [
            self.launch.argv, sorted(self.set_env().items()), sorted(self.launch.unset_env), run.cwd, run.user, run.umask,
            run.nice, run.cpu, run.nofile, run.logs.capture, self.context.host, self.context.port, self.device,
            self.endpoint.base_url if self.external and self.endpoint else None, self.missing_program is not None,
        ]  # fmt: skip
        if self.has_channel:
            parts.append("channel")
        return hashlib.sha256(json.dumps(parts, default=str).encode()).hexdigest()[:16]

    def shown_argv(self) -> list[str]:
        """Return the command line with secrets redacted."""
        secrets = {value for key, value in self.set_env().items() if key in self.launch.secret_env and len(value) >= 4}
        return redacted_argv(self.launch.argv, secrets)

    def shown_env(self) -> dict[str, str]:
        """Return the variables beyond the inherited part, with secrets redacted."""
        return redacted_env(self.set_env(), self.launch.secret_env)


def connect_host(host: str) -> str:
    """Return the address, for a URL, to reach a local server that listens on `host`."""
    if host in ("", "0.0.0.0", "*"):
        return "127.0.0.1"
    if host == "::":
        return "[::1]"
    return f"[{host}]" if ":" in host and not host.startswith("[") else host


_JSON_TYPES = frozenset({str, int, float, bool, type(None)})


def plain(value: Any) -> Any:
    """Return a value of the configuration as JSON types, for hashes and output."""
    if type(value) in _JSON_TYPES:
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(item) for item in value]
    if hasattr(value, "model_dump"):
        return plain(value.model_dump())
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
