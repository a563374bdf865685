"""`python -m tests.simulation SEED STEPS [RUNS]`: long seeded runs; prints what happened, exits 1 with the story of a violation."""

from __future__ import annotations

import sys
import time
from random import Random

from fleetd.errors import FleetError
from tests.simulation.actions import act, calm_down, shut_down
from tests.simulation.checks import Violation
from tests.simulation.specs import random_fleet
from tests.simulation.world import World


def simulate(seed: int, steps: int) -> World:
    """Run one seeded world for `steps` actions, then calm it down and shut it down."""
    rng = Random(seed)
    world = World(random_fleet(Random(seed)), seed, honest=seed % 3 != 0)
    for _ in range(steps):
        act(world, rng)
    calm_down(world)
    shut_down(world)
    return world


def main(arguments: list[str]) -> int:
    seed, steps = int(arguments[0]), int(arguments[1])
    runs = int(arguments[2]) if len(arguments) > 2 else 1
    began = time.perf_counter()
    events = 0
    outcomes: dict[str, int] = {}
    for number in range(seed, seed + runs):
        try:
            world = simulate(number, steps)
        except (Violation, FleetError) as error:
            print(f"seed {number}: {type(error).__name__}: {error}")
            return 1
        events += world.steps
        for key, count in world.outcomes.items():
            outcomes[key] = outcomes.get(key, 0) + count
    print(
        f"{runs} runs of {steps} actions, {events} events, {time.perf_counter() - began:.1f} s, no violation: {outcomes}"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
