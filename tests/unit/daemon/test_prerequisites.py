"""Prerequisite checks while the configuration changes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fleetd.core.data.events import Event, ProcessPrerequisitesChanged
from fleetd.daemon.reload.active import ActiveConfiguration
from fleetd.daemon.reload.deferred_env import DeferredEnvironment
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.resolver.launch_plan import LaunchPlan

DEADLINE_S = 20.0


class SlowStore:
    """An engine whose store is slow to report whether it has a copy of a missing file."""

    def __init__(self) -> None:
        self.asked, self.go_on = threading.Event(), threading.Event()

    @property
    def store(self) -> SlowStore:
        return self

    def has_copy(self, *_: object) -> bool:
        self.asked.set()
        assert self.go_on.wait(DEADLINE_S)
        return False


def plans(engine: SlowStore, folder: Path, models: int, **requires: str) -> Mapping[str, LaunchPlan]:
    """Return a server with missing models, and services that require a path each."""
    held = {f"m{number}": SimpleNamespace(source=str(folder / f"{number}.gguf")) for number in range(models)}
    found = {"server": ((), held), **{name: ((str(folder / path),), {}) for name, path in requires.items()}}
    return cast(
        "Mapping[str, LaunchPlan]",
        {
            name: SimpleNamespace(
                requires=paths,
                required_by={},
                engine=engine,
                held=models,
                context=None,
                endpoint=None,
                unread=(),
                env_source=None,
            )
            for name, (paths, models) in found.items()
        },
    )


def test_apply_during_a_check_keeps_the_result_of_the_new_plans(tmp_path: Path) -> None:
    engine = SlowStore()
    before = plans(engine, tmp_path, 40)
    config = SimpleNamespace(plans=before, state_dir=tmp_path / "state")
    after = plans(engine, tmp_path, 2, new="missing")
    events: list[Event] = []
    queries: Any = SimpleNamespace(process=lambda _: None, model=lambda _: None)

    async def scene() -> None:
        context: Any = SimpleNamespace(config=config, dispatch=events.append, queries=queries)
        found = Prerequisites(context, DeferredEnvironment(cast("ActiveConfiguration", config), events.append))
        checking = asyncio.create_task(found.run())
        found.recheck()
        assert await asyncio.to_thread(engine.asked.wait, DEADLINE_S)
        threading.Timer(0.05, engine.go_on.set).start()
        missing = await found.check(after)
        assert set(missing.processes) == {"new"}
        assert set(missing.models) == {"m0", "m1"}
        config.plans = after
        found.accept(missing)
        (tmp_path / "missing").touch()
        async with asyncio.timeout(DEADLINE_S):
            while ProcessPrerequisitesChanged("new", ()) not in events:
                assert not checking.done(), checking.exception()
                found.recheck()
                await asyncio.sleep(0.01)
        checking.cancel()

    asyncio.run(scene())
    assert config.plans is not before
    assert events == [ProcessPrerequisitesChanged("new", ())]
