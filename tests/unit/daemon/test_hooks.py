"""Hooks beside a stop: whichever comes first, no hook goes on that nobody waits for."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from fleetd.daemon.async_tools import Tasks
from fleetd.daemon.effects.hooks import Hooks
from fleetd.errors import HostError


def plan(name: str) -> Any:
    return SimpleNamespace(
        name=name, execution=SimpleNamespace(pre_start=("slow",), post_stop=(), cwd=None), environment=lambda _: {}
    )


class Endless:
    """A machine on which no program ends by itself."""

    def __init__(self) -> None:
        self.running = asyncio.Event()

    async def run(self, *_: object) -> tuple[bool, str]:
        self.running.set()
        await asyncio.Event().wait()
        raise AssertionError


async def refused(order: str) -> str:
    machine, stopped = Endless(), False
    hooks = Hooks(machine, Tasks(lambda *_: None), {}, lambda *_: None, lambda _: stopped)  # type: ignore[arg-type]
    if order == "the stop first":
        stopped = True
        hooks.break_off()
    hook = asyncio.ensure_future(hooks.pre_start(plan("a")))
    if order == "the hook first":
        await machine.running.wait()
        stopped = True
        hooks.break_off()
    with pytest.raises(HostError) as caught:
        await asyncio.wait_for(hook, 10)
    assert machine.running.is_set() == (order == "the hook first")
    return str(caught.value)


@pytest.mark.parametrize("order", ["the hook first", "the stop first"])
def test_a_stop_and_a_hook_in_either_order(order: str) -> None:
    assert "its pre_start hook failed: a stop" in asyncio.run(refused(order))
