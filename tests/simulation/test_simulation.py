"""The simulated world as a state machine, and as plain seeded runs. `python -m tests.simulation SEED STEPS RUNS` runs it for longer."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from tests.simulation import actions
from tests.simulation.__main__ import simulate
from tests.simulation.mutants import MUTANTS, ROOT, Mutant
from tests.simulation.specs import random_fleet
from tests.simulation.world import World

pytestmark = pytest.mark.timeout(600)  # computes for half a minute on a quiet core


class FleetInAWorld(RuleBasedStateMachine):
    """Hypothesis chooses what people and fate do; the world checks itself after every event."""

    def __init__(self) -> None:
        super().__init__()
        self.world: World | None = None

    @initialize(seed=st.integers(0, 10_000), honest=st.booleans())
    def begin(self, seed: int, honest: bool) -> None:
        self.world = World(random_fleet(Random(seed)), seed, honest)

    def do(self, number: int, seed: int) -> None:
        assert self.world is not None
        actions.ACTIONS[number][0](self.world, Random(seed))

    @rule(seconds=st.sampled_from((0.0, 0.1, 1.0, 5.0, 30.0)))
    def time_passes(self, seconds: float) -> None:
        assert self.world is not None
        self.world.advance(seconds)

    @rule(name=st.sampled_from(actions.NAMES))
    def a_client_comes(self, name: str) -> None:
        assert self.world is not None
        self.world.ask(name)

    @rule(number=st.integers(0, len(actions.ACTIONS) - 1), seed=st.integers(0, 1000))
    def something_happens(self, number: int, seed: int) -> None:
        self.do(number, seed)

    def teardown(self) -> None:
        if self.world is not None:
            actions.calm_down(self.world)
            actions.shut_down(self.world)


TestFleetInAWorld = FleetInAWorld.TestCase
TestFleetInAWorld.settings = settings(
    max_examples=12,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
)


@pytest.mark.parametrize("seed", range(100, 108))
def test_seeded_run_has_no_violation(seed: int) -> None:
    world = simulate(seed, 60)
    assert world.outcomes["granted"] > 10
    assert world.finished


def test_same_seed_gives_the_same_run() -> None:
    first, second = simulate(7, 40), simulate(7, 40)
    assert (first.steps, first.outcomes, first.now) == (second.steps, second.outcomes, second.now)


@pytest.mark.parametrize("mutant", MUTANTS, ids=[mutant.name for mutant in MUTANTS])
def test_planted_bug_fits_the_text_of_its_module(mutant: Mutant) -> None:
    source = (ROOT / "fleetd" / "core" / f"{mutant.module}.py").read_text("utf-8")
    assert source.count(mutant.old) == 1
