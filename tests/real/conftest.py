"""Check for leaks per file: the tests of a file share one machine or engine, since a start takes a minute."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest


@pytest.fixture(autouse=True, scope="module")
def nothing_left_by_the_file() -> Iterator[None]:
    before = {child.pid for child in psutil.Process().children(recursive=True)}
    yield
    left = [child for child in psutil.Process().children(recursive=True) if child.pid not in before]
    _, alive = psutil.wait_procs(left, timeout=5)
    assert not alive, f"left behind: {alive}"


@pytest.fixture(autouse=True)
def no_leaks() -> None:
    """Take the place of the check of every single test."""
