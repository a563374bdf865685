"""Gather the facts that the doctor judges: of fleet.yaml, its folders, programs, ports, and the machine.

Invariants:
- Nothing is changed, started or downloaded; every look is bounded, and one that does not answer is named in `silent`.
- It works without a fleet.yaml, with an invalid one, without a daemon and with one.
"""

from __future__ import annotations

import os
import pwd
import shlex
import shutil
import socket
import stat
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fleetd import __version__
from fleetd.config.load import LoadedConfig, load
from fleetd.config.schema.fleet import FleetConfig
from fleetd.engines.program import in_places
from fleetd.errors import ConfigError
from fleetd.host.process.process_set import INSTANCE_VARIABLE, STATE_VARIABLE, carriers
from fleetd.host.process.table import ProcessTable, command_of, system_table
from fleetd.host.system import ports
from fleetd.host.system.memory import Devices, DeviceSample
from fleetd.host.system.volumes import Volumes
from fleetd.resolver.build import resolve_fleet
from fleetd.resolver.check import finder, learned_footprints
from fleetd.resolver.launch_plan import LaunchPlan
from fleetd.resolver.port_assignment import kept_ports
from fleetd.resolver.resolved import FleetPaths, ResolvedFleet, Surroundings, machine_devices, paths_of
from fleetd.setup import programs, servers
from fleetd.setup.bounded import together
from fleetd.setup.doctor import gather_service, gather_system
from fleetd.setup.doctor.facts import (
    ConfigFact,
    DaemonFact,
    Facts,
    FolderFact,
    LeftFact,
    LimitsFact,
    OllamaFact,
    PathFact,
    PortFact,
    ProgramFact,
    ServiceFact,
)

CONFIG_S, LOOK_S, PATH_S = 15.0, 20.0, 5.0
PLACES_MAX = 64
HANDLES = "handles"
# engine → the command that installs its program
INSTALL: Mapping[str, str] = {
    "llamacpp": "pipx inject fleetd 'fleetd[llamacpp]'   # or put llama-server on PATH",
    "ollama": "curl -fsSL https://ollama.com/install.sh | sh   # macOS: brew install ollama",
    "vllm": "pip install vllm   # and set command: [/path/to/venv/bin/vllm, serve]",
    "lmstudio": "~/.lmstudio/bin/lms bootstrap   # after installing LM Studio, https://lmstudio.ai",
}
OLLAMA_PORT = 11434


@dataclass(frozen=True, slots=True)
class _Fleet:
    """The resolved fleet.yaml, as far as it could be resolved."""

    fact: ConfigFact
    paths: FleetPaths
    resolved: ResolvedFleet | None = None

    @property
    def plans(self) -> dict[str, LaunchPlan]:
        """The processes that fleetd itself starts."""
        if self.resolved is None:
            return {}
        return {name: plan for name, plan in self.resolved.plans.items() if not plan.external}


def gather(config: Path | None, env: Mapping[str, str], daemon: DaemonFact) -> Facts:
    """Return the facts. Blocks for at most about half a minute."""
    samples = together({"devices": lambda: tuple(Devices().sample())}, CONFIG_S).get("devices", ())
    samples = () if isinstance(samples, Exception) else samples
    read = together({"config": partial(_fleet, config, env, samples)}, CONFIG_S)
    fleet = _read_fleet(read.get("config"), config)
    looks = _looks(fleet, env, daemon, samples)
    found = together(looks, LOOK_S)
    silent = [name for name in looks if name not in found]
    silent += [f"{name} ({result})" for name, result in found.items() if isinstance(result, Exception)]
    good = {name: result for name, result in found.items() if not isinstance(result, Exception)}
    service, baked = good.get("service", (ServiceFact(), None))
    plans = fleet.plans.values()
    engines = (
        {plan.engine_name for plan in fleet.resolved.plans.values() if plan.engine_name} if fleet.resolved else set()
    )
    named = good.get("ollama", OllamaFact())
    return Facts(
        platform=sys.platform,
        uid=os.geteuid(),
        version=__version__,
        python=(sys.version_info[0], sys.version_info[1]),
        config=fleet.fact,
        daemon=daemon,
        folders=tuple(_folders(fleet.paths)),
        programs=tuple(program_facts(plans, env, baked)),
        installed=with_running(good.get("installed", ()), good.get("running")),
        engines=tuple(sorted(engines)),
        ports=good.get("ports", ()),
        paths=tuple(_required(plans)),
        limits=good.get("limits", LimitsFact()),
        library=good.get("library", Facts().library),
        gpu=good.get("gpu", Facts().gpu),
        memory=good.get("memory", Facts().memory),
        ollama=replace(
            named,
            engine=any(plan.engine_name == "ollama" for plan in plans),
            external="ollama" in engines and not any(plan.engine_name == "ollama" for plan in plans),
        ),
        service=service,
        clock=good.get("clock", Facts().clock),
        left=good.get("left", ()),
        silent=tuple(silent),
    )


def _looks(
    fleet: _Fleet, env: Mapping[str, str], daemon: DaemonFact, samples: tuple[DeviceSample, ...]
) -> dict[str, Callable[[], Any]]:
    plans = fleet.plans
    engines = {plan.engine_name for plan in plans.values()}
    devices = fleet.resolved.spec.devices if fleet.resolved else {}
    stated = {name: device.budget_bytes for name, device in devices.items()}
    gpus = sorted({plan.device for plan in plans.values() if plan.device.startswith("gpu")})
    embedded = "llamacpp" in engines and shutil.which("llama-server", path=env.get("PATH")) is None
    place = str(fleet.paths.state / HANDLES)
    kind = gather_service.init_system()
    return {
        "installed": partial(programs.installed, env),
        "running": partial(servers.look, OLLAMA_PORT),
        "ports": partial(_ports, fleet, daemon, place),
        "limits": partial(gather_system.limits, daemon.pid, len(plans)),
        "library": partial(gather_system.library, embedded),
        "gpu": partial(gather_system.gpu, gpus),
        "memory": partial(gather_system.memory, samples, stated),
        "clock": partial(gather_system.clock, (fleet.paths.state, fleet.paths.logs)),
        "service": partial(_service, kind, env),
        "ollama": partial(gather_service.ollama, kind),
        "left": partial(left_running, place),
    }


def with_running(
    installed: tuple[programs.Installed, ...], running: servers.Running | None
) -> tuple[programs.Installed, ...]:
    """Add a running Ollama of another version than the installed one, such as one in a container."""
    if running is None or running.engine != "ollama" or running.version is None:
        return installed
    if any(one.name == "ollama" and one.version == running.version for one in installed):
        return installed
    return (*installed, programs.Installed("ollama", f"the server on port {running.port}", running.version))


# -- fleet.yaml --------------------------------------------------------------------------------------------------------------


def _fleet(config: Path | None, env: Mapping[str, str], samples: tuple[DeviceSample, ...]) -> _Fleet:
    if config is None:
        return _Fleet(ConfigFact(), default_paths())
    exposed = _exposed(config)
    fact = ConfigFact(str(config), exposed=exposed)
    try:
        if not config.is_file():
            return _Fleet(
                replace(fact, unread="no such file" if not config.exists() else "not a regular file"), default_paths()
            )
        loaded = load(config, env, finder(env))
    except ConfigError as error:
        return _Fleet(replace(fact, problems=tuple(map(str, error.problems))), default_paths())
    except OSError as error:
        return _Fleet(replace(fact, unread=error.strerror or str(error)), default_paths())
    paths = paths_of(loaded)
    around = Surroundings(
        tuple(machine_devices(samples)), dict(env), kept_ports(paths.state), learned_footprints(paths.state)
    )
    resolved = resolve_fleet(loaded, around, hostname=socket.gethostname())
    return _Fleet(_judged(fact, loaded, resolved), paths, resolved)


def _judged(fact: ConfigFact, loaded: LoadedConfig, resolved: ResolvedFleet) -> ConfigFact:
    listen = loaded.config.gateway.listen
    exposed = next((found for file in resolved.files if (found := _exposed(file)) is not None), None)
    return replace(
        fact,
        exposed=fact.exposed or exposed,
        problems=tuple(map(str, resolved.problems)),
        warnings=tuple(map(str, resolved.warnings)),
        listen=f"{listen.host}:{listen.port}",
        loopback=listen.is_loopback,
        insecure=loaded.config.gateway.insecure,
    )


def _read_fleet(result: Any, config: Path | None) -> _Fleet:
    if isinstance(result, _Fleet):
        return result
    why = f"does not answer within {CONFIG_S:g} s" if result is None else str(result)
    return _Fleet(ConfigFact(str(config) if config else None, unread=why), default_paths())


def default_paths() -> FleetPaths:
    """Return the folders of a fleet whose file names none."""
    keys = FleetConfig().paths
    return FleetPaths(*(Path(path).expanduser() for path in (keys.state, keys.run, keys.logs)))


def _exposed(config: Path) -> str | None:
    """Return the file or its folder if others may write it; a folder with the sticky bit protects what is in it."""
    for path in (config, config.parent):
        try:
            mode = path.stat().st_mode
        except OSError:
            continue
        if mode & 0o022 and not (stat.S_ISDIR(mode) and mode & stat.S_ISVTX):
            return str(path)
    return None


# -- folders and paths ---------------------------------------------------------------------------------------------------------


def _folders(paths: FleetPaths) -> Iterable[FolderFact]:
    roles = {"state": paths.state, "run": paths.run, "logs": paths.logs}
    found = together({role: partial(folder_fact, role, path) for role, path in roles.items()}, PATH_S)
    for role, path in roles.items():
        result = found.get(role)
        yield result if isinstance(result, FolderFact) else FolderFact(role, str(path))


def folder_fact(role: str, path: Path) -> FolderFact:
    """Return a folder as it is, or the nearest one above it that exists. Raises OSError."""
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    status = existing.stat()
    volume = os.statvfs(existing)
    return FolderFact(
        role=role,
        path=str(path),
        existing=str(existing),
        exists=existing == path,
        is_folder=stat.S_ISDIR(status.st_mode),
        is_link=path.is_symlink(),
        writable=os.access(existing, os.W_OK | os.X_OK) and not volume.f_flag & os.ST_RDONLY,
        owner=status.st_uid,
        mode=stat.S_IMODE(status.st_mode),
        free_bytes=volume.f_bavail * volume.f_frsize,
        total_bytes=volume.f_blocks * volume.f_frsize,
        free_inodes=volume.f_favail,
        total_inodes=volume.f_files,
    )


def _required(plans: Iterable[LaunchPlan]) -> Iterable[PathFact]:
    """Yield what processes require; each folder is looked at by a thread of its own, since a share may hang."""
    users: dict[str, list[str]] = defaultdict(list)
    for plan in plans:
        for required in plan.requires:
            users[required].append(plan.name)
    places: dict[str, list[Path]] = defaultdict(list)
    for required in users:
        places[str(Path(required).parent)].append(Path(required))
    listed = list(places.items())[:PLACES_MAX]
    found = together({folder: partial(Volumes().look_at_all, inside) for folder, inside in listed}, PATH_S)
    for folder, inside in listed:
        seen = found.get(folder)
        for path in inside:
            if isinstance(seen, Mapping):
                yield PathFact(str(path), tuple(users[str(path)]), seen[path].missing)
            else:
                yield PathFact(str(path), tuple(users[str(path)]), f"{path} (the volume does not answer)")


# -- programs and ports ----------------------------------------------------------------------------------------------------------


def program_facts(plans: Iterable[LaunchPlan], env: Mapping[str, str], baked: str | None) -> Iterable[ProgramFact]:
    """Yield the program of each process, once; `baked` is the PATH in the service's file."""
    users: dict[ProgramFact, list[str]] = defaultdict(list)
    for plan in plans:
        words = plan.launch.argv
        own_path = plan.environment(env).get("PATH", os.defpath)
        name = words[0] if words else plan.engine_name or plan.name
        problem, hint = plan.missing_program, INSTALL.get(plan.engine_name or "")
        if problem is None:
            problem, hint = _program_problem(words, own_path, plan.execution.cwd)
        searched = Path(name).name if Path(name).name in programs.PROGRAMS and not plan.context.command else name
        lost = problem is None and baked is not None and "PATH" not in plan.own_env and _is_lost(searched, baked)
        users[ProgramFact(searched, (), problem, hint, lost)].append(plan.name)
    for fact, names in users.items():
        yield replace(fact, processes=tuple(names))


def _is_lost(name: str, baked: str) -> bool:
    """Return whether a service with this PATH does not find a program by its name."""
    if "/" in name or shutil.which(name, path=baked) is not None:
        return False
    return in_places(name, programs.PROGRAMS.get(name, ((), None))[0]) is None


def _program_problem(words: tuple[str, ...], path: str, cwd: str | None) -> tuple[str | None, str | None]:
    """Return why a program cannot be run, and the command that helps where one is known."""
    if not words:
        return None, None
    name = words[0]
    if "/" not in name:
        return (None if shutil.which(name, path=path) else f"{name} is not on PATH"), None
    file = Path(cwd or ".") / name
    if not file.exists():
        return f"{file} does not exist", f"ls -l {shlex.quote(str(file.parent))}"
    if file.is_file() and not os.access(file, os.X_OK):
        return f"{file} is not executable", f"chmod +x {shlex.quote(str(file))}"
    return (None if file.is_file() else f"{file} is not a file"), None


def _ports(fleet: _Fleet, daemon: DaemonFact, place: str) -> tuple[PortFact, ...]:
    """Return the ports that fleet.yaml states; one that fleetd assigned is replaced by itself when it is taken."""
    users: dict[tuple[str, int], list[str]] = defaultdict(list)
    if fleet.resolved is not None:
        users[(fleet.resolved.gateway.host, fleet.resolved.gateway.port)].append("gateway")
        for name, plan in fleet.plans.items():
            port = fleet.resolved.spec.processes[name].port
            if port is not None and fleet.resolved.ports.get(name) != port:
                users[(plan.context.host, port)].append(name)
    table = system_table()
    return tuple(_port(host, port, tuple(names), daemon, place, table) for (host, port), names in users.items())


def _port(
    host: str, port: int, names: tuple[str, ...], daemon: DaemonFact, place: str, table: ProcessTable
) -> PortFact:
    if ports.is_free(host, port):
        return PortFact(port, names)
    owner = ports.owner(port)
    pid = owner.pid if owner is not None else None
    running = daemon.state in ("running", "silent")
    if pid is None:
        return PortFact(port, names, free=False, owner=str(owner) if owner else None, ours=running)
    mark = f"{STATE_VARIABLE}={place}".encode()
    ours = pid == daemon.pid or mark in (table.environment(pid) or b"").split(b"\0")
    return PortFact(port, names, False, str(owner), pid, ours)


def left_running(place: str, table: ProcessTable | None = None) -> tuple[LeftFact, ...]:
    """Return the processes that a daemon with its records at `place` has started."""
    found = carriers(table or system_table(), STATE_VARIABLE, place)
    rows = ((entry.pid, environment.get(INSTANCE_VARIABLE, "").rpartition(":")[0]) for entry, environment in found)
    return tuple(LeftFact(name or "?", pid, command_of(pid)) for pid, name in rows if pid != os.getpid())


# -- service -----------------------------------------------------------------------------------------------------------------


def _service(kind: str, env: Mapping[str, str]) -> tuple[ServiceFact, str | None]:
    home = Path(env.get("HOME") or Path.home())
    try:
        user = pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        user = str(os.getuid())
    if kind == "systemd":
        return gather_service.systemd(home, user)
    if kind == "launchd":
        return gather_service.launchd(home, user, os.getuid())
    return ServiceFact(user=user), None
