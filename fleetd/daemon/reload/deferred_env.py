"""The env files of a process that was BLOCKED, read again before it may start.

The rules of this file
- What is read becomes part of the configuration that runs, and the fleet is told of it while the process is still BLOCKED: the
  next plan finds nothing changed, and nothing starts twice.
- A file that is there and wrong keeps its process BLOCKED, with what is wrong: in itself, or for the engine beside its options.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

from fleetd.core.data.events import Event, SpecChanged
from fleetd.daemon.effects.processes import written
from fleetd.daemon.reload.active import Configuration
from fleetd.engines.base import OptionProblem
from fleetd.errors import EngineError
from fleetd.resolver.environment import EnvSource, Variables, read_env_file
from fleetd.resolver.launch_plan import LaunchPlan

Missing = tuple[str, ...]
PATIENCE_S = 5.0  # for a change of the configuration that is under way


class LateEnvironment:
    """`missing()` and `missing_models()` are what the fleet was told to be absent."""

    def __init__(
        self,
        configuration: Configuration,
        dispatch: Callable[[Event], None],
        missing: Callable[[], tuple[Mapping[str, Missing], Mapping[str, Missing]]],
    ) -> None:
        self._configuration = configuration
        self._dispatch = dispatch
        self._missing = missing

    async def read(self, name: str) -> Missing | None:
        """Read the files of a process; return what keeps it from starting, None: ask again."""
        configuration = self._configuration
        plan = configuration.assembly.plans.get(name)
        if plan is None or plan.env_source is None:
            return ()
        try:
            async with asyncio.timeout(PATIENCE_S):
                await configuration.applying.acquire()
        except TimeoutError:
            return None
        try:
            if configuration.assembly.plans.get(name) is not plan:
                return None
            env, wrong = await asyncio.to_thread(_read, plan, plan.env_source)
            if not wrong:
                self._complete(plan, env)
            return wrong
        finally:
            configuration.applying.release()

    def _complete(self, plan: LaunchPlan, env: dict[str, str]) -> None:
        if env == plan.own_env and not plan.unread:
            return
        self._configuration.amend(with_environment(plan, env))
        missing, models = self._missing()
        self._dispatch(SpecChanged(self._configuration.assembly.spec, missing=missing, missing_models=models))


def with_environment(plan: LaunchPlan, env: dict[str, str]) -> LaunchPlan:
    """Return the plan with another environment, all of its files read."""
    requires = tuple(path for path in plan.requires if path not in plan.unread)
    recipe = replace(plan.recipe, own_env=env) if plan.recipe is not None else None
    context = replace(plan.context, env=env)
    plan = replace(plan, own_env=env, context=context, recipe=recipe, requires=requires, unread=())
    if plan.external:
        return plan
    try:
        return written(replace(plan, missing_program=plan.missing_program or "written anew"))
    except EngineError as error:
        return replace(plan, missing_program=error.sentence)


def _read(plan: LaunchPlan, source: EnvSource) -> tuple[dict[str, str], Missing]:
    """Return the environment that the files make, and what is wrong or absent. Blocks."""
    contents: list[Variables] = []
    wrong: list[str] = []
    for path, key in source.files.items():
        found = read_env_file(Path(path))
        if found is None:
            wrong.append(f"{key}: {path} (it does not exist)")
            continue
        contents.append(found[0])
        mistakes = found[1]
        said = [f"line {line}: {message}" for line, message in mistakes.lines[:1]]
        wrong += [f"{key}: {one}" for one in [mistakes.general, *(f"{path} ({text})" for text in said)] if one]
    env = source.made(contents)
    judged = plan.engine.validate(replace(plan.context, env=env)) if not wrong else ()
    wrong += [f"{plan.place}.{'.'.join(map(str, one.path))}: {one.message}" for one in judged if _refuses(one)]
    return env, tuple(wrong)


def _refuses(found: OptionProblem) -> bool:
    return found.path[:1] == ("env",) and not found.warning
