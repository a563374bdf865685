"""What is looked at while the plans change: the looking goes on, and nothing is told of plans that are gone."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

from fleetd.core.data.events import Event, RequirementsChanged
from fleetd.core.queries import FleetQueries
from fleetd.daemon.sources.prerequisites import Requirements
from fleetd.resolver.launch_plan import LaunchPlan

DEADLINE_S = 20.0


class SlowStore:
    """An engine whose store is asked for a copy of each absent file, and takes its time."""

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
    """Return a server with absent models, and services that require a path each."""
    held = {f"m{number}": SimpleNamespace(source=str(folder / f"{number}.gguf")) for number in range(models)}
    found = {"server": ((), held), **{name: ((str(folder / path),), {}) for name, path in requires.items()}}
    return cast(
        "Mapping[str, LaunchPlan]",
        {
            name: SimpleNamespace(
                requires=paths, required_by={}, engine=engine, held=models, context=None, endpoint=None, unread=()
            )
            for name, (paths, models) in found.items()
        },
    )


def test_an_apply_in_the_middle_of_a_look_neither_ends_the_looking_nor_is_undone_by_it(tmp_path: Path) -> None:
    engine = SlowStore()
    now = before = plans(engine, tmp_path, 40)
    after = plans(engine, tmp_path, 2, new="absent")
    told: list[Event] = []
    queries: Any = SimpleNamespace(process=lambda _: None, model=lambda _: None)

    async def scene() -> None:
        nonlocal now
        found = Requirements(told.append, lambda: now, cast("FleetQueries", queries), tmp_path / "state")
        looking = asyncio.create_task(found.run())
        found.look_soon()
        assert await asyncio.to_thread(engine.asked.wait, DEADLINE_S)
        threading.Timer(0.05, engine.go_on.set).start()
        absent = await found.look(after)
        assert set(absent.processes) == {"new"}
        assert set(absent.models) == {"m0", "m1"}
        now = after
        found.accept(absent)
        (tmp_path / "absent").touch()
        async with asyncio.timeout(DEADLINE_S):
            while RequirementsChanged("new", ()) not in told:
                assert not looking.done(), looking.exception()
                found.look_soon()
                await asyncio.sleep(0.01)
        looking.cancel()

    asyncio.run(scene())
    assert before is not now
    assert told == [RequirementsChanged("new", ())]
