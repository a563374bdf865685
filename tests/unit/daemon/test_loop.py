"""The single writer: order, re-entrance, the timer, and what happens to a bug."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from fleetd.core.data.commands import Command, Finished, Spawn
from fleetd.core.data.events import Event, StartRequested, Tick
from fleetd.daemon.loop import FleetLoop


class ScriptedFleet:
    """Answers each event with what a function says, and remembers what it saw."""

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


def test_a_command_that_dispatches_is_handled_after_its_event() -> None:
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


def test_the_deadline_becomes_one_tick() -> None:
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


def test_a_nearer_deadline_moves_the_timer_and_a_closed_loop_has_none() -> None:
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


def test_a_bug_in_the_fleet_is_told_and_the_next_event_is_handled() -> None:
    def answer(event: Event) -> list[Command]:
        if event == StartRequested("bad"):
            raise ValueError("impossible")
        return []

    told: list[tuple[Event, Exception]] = []
    fleet = ScriptedFleet(answer)
    loop = FleetLoop(fleet, Recorder(), fault=lambda event, error: told.append((event, error)))

    async def body() -> None:
        loop.dispatch(StartRequested("bad"))
        loop.dispatch(StartRequested("good"))

    asyncio.run(body())
    assert [(event, str(error)) for event, error in told] == [(StartRequested("bad"), "impossible")]
    assert fleet.seen[-1] == StartRequested("good")


def test_without_a_listener_a_bug_is_raised_and_the_loop_still_works() -> None:
    fleet = ScriptedFleet(lambda event: 1 / 0 if event == StartRequested("bad") else [])
    loop = FleetLoop(fleet, Recorder())

    async def body() -> None:
        with pytest.raises(ZeroDivisionError):
            loop.dispatch(StartRequested("bad"))
        loop.dispatch(StartRequested("good"))

    asyncio.run(body())
    assert fleet.seen == [StartRequested("bad"), StartRequested("good")]


def test_the_observer_sees_every_step_in_order() -> None:
    steps: list[tuple[Event, list[Command]]] = []
    fleet = ScriptedFleet(lambda event: [Spawn("a", 1, "r")])
    loop = FleetLoop(fleet, Recorder(), observe=lambda event, commands, now: steps.append((event, commands)))

    async def body() -> None:
        loop.dispatch(StartRequested("a"))

    asyncio.run(body())
    assert steps == [(StartRequested("a"), [Spawn("a", 1, "r")])]


def test_loop_announces_an_event_before_its_commands_start() -> None:
    order: list[str] = []
    executor = Recorder()
    executor.hook = lambda _: order.append("command")
    loop = FleetLoop(
        ScriptedFleet(lambda _: [Spawn("a", 1, "r")]),
        executor,
        announce=lambda *_: order.append("announce"),
        observe=lambda *_: order.append("observe"),
    )

    async def body() -> None:
        loop.dispatch(StartRequested("a"))

    asyncio.run(body())
    assert order == ["announce", "command", "observe"]
