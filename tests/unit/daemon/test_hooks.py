"""A pre_start hook and a stop, in either order."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fleetd.core.data.events import Tick
from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.effects.hooks import Hooks
from fleetd.errors import HostError


def plan(name: str) -> Any:
    return SimpleNamespace(name=name, pre_start=("slow",), post_stop=(), execution=SimpleNamespace(cwd=None))


class EndlessCommands:
    """Commands that never exit by themselves."""

    def __init__(self) -> None:
        self.running = asyncio.Event()

    async def run(self, *_: object) -> tuple[bool, str]:
        self.running.set()
        await asyncio.Event().wait()
        raise AssertionError


async def refused(order: str) -> str:
    commands, stopped = EndlessCommands(), False
    context: Any = SimpleNamespace(
        queries=SimpleNamespace(process=lambda _: "a process", is_wanted=lambda _: not stopped),
        tasks=Tasks(lambda *_: None),
        config=SimpleNamespace(environment=lambda _: {}),
    )
    hooks = Hooks(context, commands)
    if order == "the stop first":
        stopped = True
        hooks.cancel_unwanted(Tick())
    hook = asyncio.ensure_future(hooks.pre_start(plan("a")))
    if order == "the hook first":
        await commands.running.wait()
        stopped = True
        hooks.cancel_unwanted(Tick())
    with pytest.raises(HostError) as caught:
        await asyncio.wait_for(hook, 10)
    assert commands.running.is_set() == (order == "the hook first")
    return str(caught.value)


@pytest.mark.parametrize("order", ["the hook first", "the stop first"])
def test_hook_fails_when_a_stop_comes_before_or_after(order: str) -> None:
    assert "its pre_start hook failed: a stop" in asyncio.run(refused(order))
