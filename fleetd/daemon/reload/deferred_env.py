"""Read the env files of a BLOCKED process again before it may start.

Invariants:
- The result becomes part of the active configuration, and the fleet receives it while the process is still BLOCKED: the
  next plan shows no change, and nothing starts twice.
- An invalid file keeps its process BLOCKED, with the problem: of the file itself, or of the engine with its options.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from fleetd.core.data.events import Event, SpecChanged
from fleetd.daemon.effects.run import with_launch
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.engines.base import OptionProblem
from fleetd.errors import EngineError
from fleetd.resolver.environment import EnvSource, Variables, read_env_file
from fleetd.resolver.launch_plan import LaunchPlan

Missing = tuple[str, ...]
LOCK_WAIT_S = 5.0  # for a change of the configuration in progress


@dataclass(slots=True)
class MissingPrerequisites:
    """What is missing, by process and by held model; empty ones are left out."""

    processes: dict[str, Missing] = field(default_factory=dict)
    models: dict[str, Missing] = field(default_factory=dict)


class DeferredEnvironment:
    """Read env files that were missing when the configuration was read."""

    def __init__(self, config: ActiveConfiguration, dispatch: Callable[[Event], None]) -> None:
        self._config = config
        self._dispatch = dispatch

    async def read(self, name: str, reported: MissingPrerequisites) -> Missing | None:
        """Read the files of a process; return what still blocks it, None: ask again.

        `reported` is what the fleet knows to be missing; it is repeated with the new spec.
        """
        config = self._config
        plan = config.plans.get(name)
        if plan is None or plan.env_source is None:
            return ()
        try:
            async with asyncio.timeout(LOCK_WAIT_S):
                await config.applying.acquire()
        except TimeoutError:
            return None
        try:
            if config.plans.get(name) is not plan:
                return None
            env, problems = await asyncio.to_thread(_read, plan, plan.env_source)
            if not problems and (env != plan.own_env or plan.unread):
                config.amend(with_environment(plan, env))
                spec = config.resolved.spec
                self._dispatch(SpecChanged(spec, missing=reported.processes, missing_models=reported.models))
            return problems
        finally:
            config.applying.release()


def with_environment(plan: LaunchPlan, env: dict[str, str]) -> LaunchPlan:
    """Return the plan with another environment, all of its files read."""
    requires = tuple(path for path in plan.requires if path not in plan.unread)
    recipe = replace(plan.recipe, own_env=env) if plan.recipe is not None else None
    context = replace(plan.context, env=env)
    plan = replace(plan, own_env=env, context=context, recipe=recipe, requires=requires, unread=())
    if plan.external:
        return plan
    try:
        return with_launch(plan)
    except EngineError as error:
        return replace(plan, missing_program=error.sentence)


def _read(plan: LaunchPlan, source: EnvSource) -> tuple[dict[str, str], Missing]:
    """Return the environment of the files, and what is invalid or missing. Blocks."""
    contents: list[Variables] = []
    problems: list[str] = []
    for path, key in source.files.items():
        found = read_env_file(Path(path))
        if found is None:
            problems.append(f"{key}: {path} (it does not exist)")
            continue
        contents.append(found[0])
        mistakes = found[1]
        lines = [f"line {line}: {message}" for line, message in mistakes.lines[:1]]
        problems += [f"{key}: {one}" for one in [mistakes.general, *(f"{path} ({text})" for text in lines)] if one]
    env = source.made(contents)
    judged = plan.engine.validate(replace(plan.context, env=env)) if not problems else ()
    problems += [f"{plan.place}.{'.'.join(map(str, one.path))}: {one.message}" for one in judged if _blocks(one)]
    return env, tuple(problems)


def _blocks(found: OptionProblem) -> bool:
    return found.path[:1] == ("env",) and not found.warning
