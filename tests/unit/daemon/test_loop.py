"""The fleet loop: order, re-entrance, the timer, subscribers, and bugs of the fleet."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fleetd.core.data.commands import Command, Finished, Spawn
from fleetd.core.data.events import Event, StartRequested, Tick
from fleetd.daemon.loop import FleetLoop


class ScriptedFleet:
    """Answer each event by a function, and record the events."""

    def __init__(self, answer: Callable[[Event], list[Command]] = lambda event: []) -> None:
        self.answer, self.seen, self.deadline = answer, [], None
        self.inside = False

    def handle(self, event: Event, now: float) -> list[Command]:
        assert not self.inside, "the fleet was entered twice"
        self.inside = True
        try:
            self.seen.append(event)
            return self.answer(event)
        finally:
            self.inside = False

    def next_deadline(self) -> float | None:
        return self.deadline


class Recorder:
    def __init__(self) -> None:
        self.commands: list[Command] = []
        self.hook: Callable[[Command], None] = lambda command: None

    def start(self, command: Command) -> None:
        self.commands.append(command)
        self.hook(command)


def test_event_of_a_command_is_handled_after_its_step() -> None:
    def answer(event: Event) -> list[Command]:
        return [Spawn(event.name, 1, "asked"), Spawn(event.name, 2, "asked")] if event == StartRequested("a") else []

    fleet, executor = ScriptedFleet(answer), Recorder()
    loop = FleetLoop(fleet, executor)
    executor.hook = lambda command: loop.dispatch(StartRequested(f"from-{command.generation}"))

    async def body() -> None:
        loop.dispatch(StartRequested("a"))

    asyncio.run(body())
    assert fleet.seen == [StartRequested("a"), StartRequested("from-1"), StartRequested("from-2")]
    assert [command.generation for command in executor.commands] == [1, 2]


def test_deadline_becomes_one_tick() -> None:
    fleet = ScriptedFleet()

    async def body() -> None:
        ticked = asyncio.Event()

        def answer(event: Event) -> list[Command]:
            if isinstance(event, Tick):
                fleet.deadline = None
                ticked.set()
            return []

        fleet.answer = answer
        loop = FleetLoop(fleet, Recorder(), clock=asyncio.get_running_loop().time)
        fleet.deadline = asyncio.get_running_loop().time() + 0.02
        loop.dispatch(StartRequested("a"))
        await asyncio.wait_for(ticked.wait(), 5)

    asyncio.run(body())
    assert fleet.seen == [StartRequested("a"), Tick()]


def test_nearer_deadline_moves_the_timer_until_close() -> None:
    fleet = ScriptedFleet()

    async def body() -> None:
        clock = asyncio.get_running_loop().time
        loop = FleetLoop(fleet, Recorder(), clock=clock)
        fleet.deadline = clock() + 3600
        loop.dispatch(StartRequested("far"))
        fleet.deadline = clock() + 0.01
        ticked = asyncio.Event()
        fleet.answer = lambda event: [ticked.set() or Finished("done")] if isinstance(event, Tick) else []
        loop.dispatch(StartRequested("near"))
        await asyncio.wait_for(ticked.wait(), 5)
        loop.close()
        fleet.deadline = clock()
        loop.dispatch(StartRequested("late"))
        await asyncio.sleep(0)
        assert fleet.seen[-1] == StartRequested("late")

    asyncio.run(body())


def test_fleet_bug_is_reported_and_the_loop_continues() -> None:
    def answer(event: Event) -> list[Command]:
        if event == StartRequested("bad"):
            raise ValueError("impossible")
        return []

    faults: list[tuple[Event, Exception]] = []
    fleet = ScriptedFleet(answer)
    loop = FleetLoop(fleet, Recorder(), fault=lambda event, error: faults.append((event, error)))

    async def body() -> None:
        loop.dispatch(StartRequested("bad"))
        loop.dispatch(StartRequested("good"))

    asyncio.run(body())
    assert [(event, str(error)) for event, error in faults] == [(StartRequested("bad"), "impossible")]
    assert fleet.seen[-1] == StartRequested("good")


def test_fleet_bug_without_fault_handler_is_raised() -> None:
    fleet = ScriptedFleet(lambda event: 1 / 0 if event == StartRequested("bad") else [])
    loop = FleetLoop(fleet, Recorder())

    async def body() -> None:
        with pytest.raises(ZeroDivisionError):
            loop.dispatch(StartRequested("bad"))
        loop.dispatch(StartRequested("good"))

    asyncio.run(body())
    assert fleet.seen == [StartRequested("bad"), StartRequested("good")]


def test_subscribers_are_called_in_order_after_the_commands() -> None:
    steps: list[tuple[str, Event, list[Command]]] = []
    fleet, executor = ScriptedFleet(lambda event: [Spawn("a", 1, "r")]), Recorder()
    loop = FleetLoop(fleet, executor)
    loop.subscribe(
        lambda event: steps.append(("first", event, list(executor.commands))),
        lambda event: steps.append(("second", event, list(executor.commands))),
    )

    async def body() -> None:
        loop.dispatch(StartRequested("a"))

    asyncio.run(body())
    assert steps == [(name, StartRequested("a"), [Spawn("a", 1, "r")]) for name in ("first", "second")]


def test_loop_announces_an_event_before_its_commands_start() -> None:
    order: list[str] = []
    executor = Recorder()
    executor.hook = lambda _: order.append("command")
    loop = FleetLoop(ScriptedFleet(lambda _: [Spawn("a", 1, "r")]), executor)
    loop.subscribe(lambda _: order.append("announce"), before_commands=True)
    loop.subscribe(lambda _: order.append("observe"))

    async def body() -> None:
        loop.dispatch(StartRequested("a"))

    asyncio.run(body())
    assert order == ["announce", "command", "observe"]
