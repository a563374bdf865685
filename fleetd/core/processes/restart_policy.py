"""Decide whether and when a dead process starts again.

Invariants:
- Pure functions: `now` and the random source are arguments.
- The backoff grows with deaths since the last *stable* run; only a stable run resets it.
- The crash loop counts deaths in a sliding window, independent of the backoff and of stable runs; with `min_uptime_s`, only
  deaths of shorter runs.
- Only deaths count: a requested stop or restart does not, a kill by a liveness probe does.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from itertools import islice
from typing import TYPE_CHECKING

from fleetd.core.data.specs import Backoff, ExitKind, ExitReport, RestartMode, RestartPolicy, brief_exit, describe_exit

if TYPE_CHECKING:
    from random import Random

_REMEMBERED_DEATHS = 1000
_KEPT_DEATHS = 20  # over a restart of the daemon: each of its records holds them


@dataclass(slots=True)
class RestartRecord:
    """The deaths of one process."""

    deaths: int = 0  # since the last stable run
    times: deque[float] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_DEATHS))  # monotonic seconds of deaths
    slow: bool = False

    def last(self, count: int) -> tuple[float, ...]:
        """Return the last death times for the next daemon; `count` make a crash loop."""
        return tuple(islice(self.times, max(0, len(self.times) - min(count, _KEPT_DEATHS)), None))

    def reset(self) -> None:
        """Forget all deaths: an operator or an edit asks for a new try."""
        self.deaths, self.slow = 0, False
        self.times.clear()

    def stable(self) -> None:
        """Reset the backoff; the window of the crash loop stays."""
        self.deaths, self.slow = 0, False


@dataclass(frozen=True, slots=True)
class Again:
    """Start again after `delay_s`."""

    delay_s: float
    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """FAILED: only an operator or an edit of the configuration starts it again."""

    reason: str


@dataclass(frozen=True, slots=True)
class Done:
    """EXITED: it exited as expected."""

    reason: str


Decision = Again | GiveUp | Done


def succeeded(policy: RestartPolicy, report: ExitReport, zero_is_failure: bool) -> bool:
    """Return whether this exit is a success for the policy."""
    if report.code is None or (zero_is_failure and report.code == 0):
        return False
    return report.code in policy.success_codes


def delay_s(backoff: Backoff, deaths: int, rng: Random) -> float:
    """Return the jittered delay after `deaths` deaths in a row, at most `max_s`."""
    plain = backoff.initial_s
    for _ in range(deaths - 1):
        if plain >= backoff.max_s or backoff.factor <= 1.0:
            break
        plain *= backoff.factor
    plain = min(backoff.max_s, plain)
    spread = rng.uniform(1 - backoff.jitter, 1 + backoff.jitter) if backoff.jitter else 1.0
    return min(backoff.max_s, plain * spread)


def after_loss(policy: RestartPolicy, record: RestartRecord, report: ExitReport, rng: Random) -> Again:
    """Retry a lost external server for ever: fleetd cannot start it."""
    record.deaths += 1
    delay = delay_s(policy.backoff, record.deaths, rng)
    return Again(delay, f"{report.reason}; next try in {delay:.2f} s")


def after_death(
    policy: RestartPolicy,
    record: RestartRecord,
    report: ExitReport,
    *,
    zero_is_failure: bool,
    now: float,
    rng: Random,
    ran_s: float = 0.0,
) -> Decision:
    """Count the death of a run that lasted `ran_s`, and decide what follows."""
    how = describe_exit(report)
    if report.kind is ExitKind.BAD_CONFIG:
        if policy.crash_loop.then == "slow" and policy.mode is not RestartMode.NEVER:
            record.deaths, record.slow = record.deaths + 1, True
            return Again(policy.crash_loop.every_s, f"{how}; one try every {policy.crash_loop.every_s:g} s")
        return GiveUp(f"{how} (a retry cannot help)")
    success = succeeded(policy, report, zero_is_failure)
    if policy.mode is RestartMode.NEVER or (policy.mode is RestartMode.ON_FAILURE and success):
        return Done(how) if success else GiveUp(f"{how}; the restart policy is {policy.mode}")
    record.deaths += 1
    loop = policy.crash_loop
    if not 0 < loop.min_uptime_s <= ran_s:
        record.times.append(now)
    recent = sum(1 for time in record.times if time > now - loop.window_s)
    if recent >= loop.count or record.slow:
        if loop.then == "fail":
            brief = brief_exit(report)
            return GiveUp(f"crashed {recent} times in {loop.window_s:g} s ({brief}); fleetd has given up")
        record.slow = True
        return Again(loop.every_s, f"crash loop: {how}; one try every {loop.every_s:g} s")
    delay = delay_s(policy.backoff, record.deaths, rng)
    return Again(delay, f"{how}; next start in {delay:.2f} s")
