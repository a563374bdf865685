"""Resolve one entry of fleet.yaml to the plan and the spec of its process.

Invariants:
- An entry with a problem gets no plan; its other problems are still reported.
- Each engine is queried once per entry.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from fleetd.config.load import LoadedConfig
from fleetd.config.placeholders import substitute
from fleetd.config.schema.process import ProcessKeys
from fleetd.config.yaml.source_map import Path_, path_text
from fleetd.core.data.specs import (
    Capabilities,
    Dependency,
    DependencyCondition,
    DeviceSpec,
    Probes,
    ProcessKind,
    ProcessSpec,
)
from fleetd.engines.base import Api, Endpoint, Engine, Launch, LaunchContext, capabilities_of
from fleetd.engines.container import Contained
from fleetd.engines.options import Options
from fleetd.engines.registry import load as find_engine
from fleetd.errors import EngineError
from fleetd.host.types import Execution
from fleetd.resolver import policies
from fleetd.resolver.containers import (
    IN_IMAGE,
    ContainerRecipe,
    inner_address,
    runs_image_program,
    runtime_of,
    user_ids,
)
from fleetd.resolver.devices import default_device
from fleetd.resolver.engine_options import read_options
from fleetd.resolver.entries import ConfigEntry, process_names
from fleetd.resolver.env_files import EnvFiles, OwnEnvironment
from fleetd.resolver.findings import Findings
from fleetd.resolver.launch_plan import LaunchPlan, Schedule, WatchPlan, connect_host
from fleetd.resolver.resolved import Surroundings, paths_of
from fleetd.resolver.served_models import held_models, own_held
from fleetd.units import expand_home

HOST = "127.0.0.1"
_BESIDE_OPTIONS = (("env",), ("args",), ("command",))
_NAMED = 10  # of thousands of models, in one message


class ProcessResolver:
    """Resolve the processes of one configuration, entry by entry, into `plans` and `specs`."""

    def __init__(
        self, loaded: LoadedConfig, around: Surroundings, devices: dict[str, DeviceSpec], findings: Findings
    ) -> None:
        self.loaded, self.config, self.around = loaded, loaded.config, around
        self.devices = devices
        self.findings = findings
        self.plans: dict[str, LaunchPlan] = {}
        self.specs: dict[str, ProcessSpec] = {}
        self._behind = process_names(self.config)
        self._env_files = EnvFiles(loaded, findings)

    def resolve(self, entry: ConfigEntry, models: list[str]) -> None:
        """Resolve one process, which holds `models`."""
        engine = self._engine(entry)
        if engine is None:
            return
        options, whole = self._options(entry, engine)
        if options is None:
            return
        device = self._device(entry)
        host, port = inner_address(entry.keys, entry.port)
        places = _placeholders(entry, host, port)
        own_env = self._env_files.environment(entry, places)
        context = self._context(entry, options, device, models, places, own_env.values)
        before = len(self.findings.problems)
        if entry.engine_keys is not None:
            self._validate(entry, engine, context, whole=whole)
        recipe = self._recipe(entry, engine, context)
        own_probes = engine.probes(options) if entry.engine_keys is not None else Probes()
        probes = policies.with_places(policies.probes(entry.keys, own_probes), places)
        port_probe = policies.needs_port(probes)
        if port_probe is not None and entry.port is None and entry.external is None:
            self.findings.problem((*entry.path, "probes"), f"the {port_probe} probe needs a port (set port)")
        own_model = self._own_model(entry, engine, models)
        if len(self.findings.problems) > before or not whole:
            return
        plan = self._plan(entry, engine, context, recipe, device, own_env, probes)
        self.plans[entry.name] = plan
        self.specs[entry.name] = self._spec(entry, plan, own_model)

    def _engine(self, entry: ConfigEntry) -> Engine | None:
        keys = entry.engine_keys
        if keys is None:
            return find_engine("process")
        try:
            return find_engine(keys.engine)
        except EngineError as error:
            self.findings.problem((*entry.path, "engine"), error.sentence)
            return None

    def _options(self, entry: ConfigEntry, engine: Engine) -> tuple[Options | None, bool]:
        """Return the valid options (None: a required one is missing), and if all are."""
        raw = entry.engine_keys.options if entry.engine_keys is not None else {"api": "none"}
        options, mistakes = read_options(engine, raw, entry.path, self.loaded.source_map)
        self.findings.add(entry.path, mistakes)
        return options, not mistakes

    def _device(self, entry: ConfigEntry) -> str:
        keys = entry.engine_keys
        if keys is None:
            return default_device(None, self.devices)
        if keys.device is None:
            return default_device(keys.engine, self.devices)
        if keys.device not in self.devices:
            known = ", ".join(self.devices)
            self.findings.warn((*entry.path, "device"), f"this machine has no device {keys.device!r}, only {known}")
        return keys.device

    def _context(
        self,
        entry: ConfigEntry,
        options: Options,
        device: str,
        models: list[str],
        places: Mapping[str, object],
        env: dict[str, str],
    ) -> LaunchContext:
        keys = entry.keys
        spec = self.devices.get(device)
        own = entry.own_model
        served_as = (own.served_as or entry.base) if own is not None else ""
        present = {one.name: one for one in self.around.devices}
        stated = self.config.devices.get(device)
        uuid = (
            stated.uuid if stated is not None and stated.uuid else present[device].uuid if device in present else None
        )
        return LaunchContext(
            name=entry.name,
            options=options,
            host=HOST,
            port=entry.port,
            replica=entry.replica,
            command=tuple(substitute(word, places) for word in keys.command or _image_command(entry)),
            args=tuple(substitute(word, places) for word in keys.args),
            env=env,
            config_dir=self.loaded.folder_of((*entry.path, "options") if entry.engine_keys else entry.path),
            device=device if entry.engine_keys is not None else None,  # a service sees every card
            device_uuid=uuid if entry.engine_keys is not None else None,
            device_total_bytes=spec.total_bytes if spec is not None else None,
            served_as=served_as,
            models=tuple(held_models(self.loaded, models)),
            external=entry.external is not None,
        )

    def _validate(self, entry: ConfigEntry, engine: Engine, context: LaunchContext, *, whole: bool) -> None:
        """Report the engine's findings; on options only if all of them are valid."""
        for found in engine.validate(context):
            if found.path[:1] == ("models",):
                path: Path_ = found.path
            elif found.path[:1] in _BESIDE_OPTIONS:
                path = (*entry.path, *found.path)
            elif whole:
                path = (*entry.path, "options", *found.path)
            else:
                continue
            (self.findings.warn if found.warning else self.findings.problem)(path, found.message)

    def _written(
        self, entry: ConfigEntry, engine: Engine, context: LaunchContext, recipe: ContainerRecipe | None
    ) -> tuple[Launch, Contained | None, str | None]:
        """Return the command line, or why there is none yet; a program may come later."""
        if entry.external is not None:
            return Launch(argv=()), None, None
        try:
            if recipe is None:
                return engine.launch(context), None, None
            contained = recipe.contain(engine, context)
            return contained.launch, contained, None
        except EngineError as error:
            self.findings.warn(entry.path if recipe is None else (*entry.path, "runtime"), error.sentence)
            return Launch(argv=()), None, error.sentence

    def _recipe(self, entry: ConfigEntry, engine: Engine, context: LaunchContext) -> ContainerRecipe | None:
        """Return the container recipe of the entry, if it has one."""
        keys = entry.keys
        if keys.runtime is None:
            return None
        where = (*entry.path, "runtime")
        if not context.command and not runs_image_program(engine.name, context.command):
            self.findings.problem(
                where, f"the engine {engine.name!r} does not know the program of the image (set command)"
            )
        for key, value in (("umask", keys.umask), ("limits", keys.limits.nice)):
            if value is not None:
                self.findings.warn((*entry.path, key), "umask and nice have no effect inside a container")
        limits = (keys.limits.cpu or (), keys.limits.nofile)
        resolve = partial(self.loaded.resolve, where)
        runtime = runtime_of(keys.runtime.docker, context.device or "", context.device_uuid, limits, resolve)
        if keys.user is not None:
            try:
                runtime = replace(runtime, user=user_ids(keys.user))
            except KeyError:
                self.findings.problem((*entry.path, "user"), f"this machine has no user {keys.user!r}")
        state = hashlib.sha256(str(paths_of(self.loaded).state).encode()).hexdigest()[:6]
        fleet = f"{self.config.name or 'fleet'}-{state}"
        return ContainerRecipe(runtime, fleet, entry.name, keys.stop.timeout, context.env)

    def _plan(
        self,
        entry: ConfigEntry,
        engine: Engine,
        context: LaunchContext,
        recipe: ContainerRecipe | None,
        device: str,
        own_env: OwnEnvironment,
        probes: Probes,
    ) -> LaunchPlan:
        keys, path = entry.keys, entry.path
        launch, contained, missing = self._written(entry, engine, context, recipe)
        requires = [str(self.loaded.resolve((*path, "requires"), text)) for text in keys.requires]
        service = entry.engine_keys is None
        options, shared = context.options, context.options.shared()
        places = _placeholders(entry, context.host, context.port)  # outside of a container
        return LaunchPlan(
            name=entry.name,
            base=entry.base,
            kind=entry.kind,
            engine_name=None if entry.engine_keys is None else entry.engine_keys.engine,
            engine=engine,
            context=context,
            api=Api.NONE if service else engine.api(options),
            launch=launch,
            endpoint=_endpoint(entry, shared.api_key),
            external=entry.external is not None,
            missing_program=missing,
            own_env=own_env.values,
            env_source=own_env.source,
            unread=tuple(own_env.missing),
            execution=self._execution(entry),
            pre_start=tuple(substitute(word, places) for word in keys.hooks.pre_start or ()),
            post_stop=tuple(substitute(word, places) for word in keys.hooks.post_stop or ()),
            stop=policies.stop_policy(keys.stop, places),
            probes=probes,
            requires=tuple(dict.fromkeys([*requires, *launch.requires, *own_env.missing])),
            required_by={**self._named(entry, launch), **own_env.missing},
            device=device,
            held={held.name: held for held in context.models},
            own_model=own_held(entry, context),
            context_length=shared.context_length,
            recipe=recipe,
            contained=contained,
            schedule=_schedule(keys),
            watch=self._watch(entry),
            source=self.findings.source(path),
            place=path_text(path),
        )

    def _named(self, entry: ConfigEntry, launch: Launch) -> dict[str, str]:
        """Return the key that names each required path; warn of missing ones, which block."""
        keys: dict[str, str] = {}
        for path, option in launch.named.items():
            where = (*entry.path, "options", *_parts(option))
            keys[path] = path_text(where)
            if not os.path.lexists(path):
                self.findings.warn(where, f"{path} is missing: {entry.name} stays BLOCKED until it exists")
        return keys

    def _execution(self, entry: ConfigEntry) -> Execution:
        keys, path = entry.keys, entry.path
        contained = keys.runtime is not None
        limits = keys.limits
        cwd = self.loaded.resolve((*path, "cwd"), keys.cwd) if keys.cwd is not None else self.loaded.folder_of(path)
        return Execution(
            cwd=str(cwd),
            user=keys.user if not contained else None,  # inside, then
            umask=keys.umask,
            nice=limits.nice if not contained else None,
            cpu=(limits.cpu or ()) if not contained else (),
            nofile=limits.nofile if not contained else None,
            logs=policies.log_policy(keys.logs),
        )

    def _watch(self, entry: ConfigEntry) -> WatchPlan | None:
        keys = entry.keys
        if keys.watch is None:
            return None
        folder = self.loaded.resolve((*entry.path, "cwd"), keys.cwd) if keys.cwd else self.loaded.folder_of(entry.path)
        paths = tuple(folder / expand_home(text) for text in keys.watch.paths)
        return WatchPlan(paths, keys.watch.ignore, keys.watch.debounce)

    def _spec(self, entry: ConfigEntry, plan: LaunchPlan, own_model: str | None) -> ProcessSpec:
        keys = entry.keys
        engine_keys = entry.engine_keys
        capabilities = Capabilities()
        if engine_keys is not None:
            capabilities = capabilities_of(plan.engine, plan.context.options)
        if plan.external:
            capabilities = replace(capabilities, owns_process=False)
        return ProcessSpec(
            name=entry.name,
            base=entry.base,
            kind=entry.kind,
            engine=plan.engine_name,
            port=entry.port,
            enabled=keys.enabled,
            on_demand=engine_keys is not None and engine_keys.start == "on-demand" and not plan.external,
            own_model=own_model,
            capabilities=capabilities,
            depends_on=self._dependencies(entry),
            restart=policies.restart_policy(keys.restart),
            probes=plan.probes,
            memory_limit_bytes=keys.limits.memory,
            max_age_s=keys.max_age,
            lane=None if engine_keys is None or plan.external else plan.device,
            launch_hash=plan.launch_hash(),
        )

    def _own_model(self, entry: ConfigEntry, engine: Engine, models: list[str]) -> str | None:
        """Return the model of this process; report several models of a one-model server."""
        if entry.own_model is not None:
            return entry.base
        if entry.kind is ProcessKind.SERVICE or engine.capabilities.many_models or entry.external is not None:
            return None
        if len(models) > 1:
            named = ", ".join(models[:_NAMED]) + (", …" if len(models) > _NAMED else "")
            self.findings.problem(
                entry.path, f"a {engine.name} server holds one model, but {len(models)} name it: {named}"
            )
        return models[0] if models else None

    def _dependencies(self, entry: ConfigEntry) -> tuple[Dependency, ...]:
        return tuple(
            Dependency(name, DependencyCondition(condition))
            for base, condition in entry.keys.depends_on.items()
            for name in self._behind.get(base, [])
            if name != entry.name
        )


def _placeholders(entry: ConfigEntry, host: str, port: int | None) -> dict[str, object]:
    """Return the values of `{port}`, `{host}`, `{name}`, `{replica}` and `{index}`."""
    return {"port": port, "host": host, "name": entry.name, "replica": entry.replica, "index": entry.replica - 1}


def _parts(option: str) -> Path_:
    """`lora[0]` → ("lora", 0)."""
    return tuple(int(part) if part.isdecimal() else part for part in re.findall(r"[^.\[\]]+", option))


def _image_command(entry: ConfigEntry) -> tuple[str, ...]:
    """Return the default program inside an image; this machine's PATH does not apply."""
    keys = entry.engine_keys
    return IN_IMAGE.get(keys.engine, ()) if keys is not None and keys.runtime is not None else ()


def _endpoint(entry: ConfigEntry, key: str | None) -> Endpoint | None:
    if entry.external is not None:
        return Endpoint(entry.external.rstrip("/"), key)
    return Endpoint(f"http://{connect_host(HOST)}:{entry.port}", key) if entry.port is not None else None


def _schedule(keys: ProcessKeys) -> Schedule | None:
    stated = keys.schedule
    return Schedule(stated.start, stated.restart, stated.timezone) if stated is not None else None
