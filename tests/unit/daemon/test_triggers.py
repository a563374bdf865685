"""The limit on restarts by watched files."""

from __future__ import annotations

from fleetd.daemon.sources.triggers import FlapGuard


def test_flap_guard_limits_restarts_within_its_window() -> None:
    guard = FlapGuard(3, 10.0)
    assert [guard.passes(now) for now in (0.0, 1.0, 2.0, 3.0, 9.9, 10.0, 10.5, 11.0, 12.0)] == [
        True, True, True, False, False, True, False, True, True,
    ]  # fmt: skip
