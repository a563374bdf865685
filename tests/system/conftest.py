"""Start the daemons of these tests from one process that has imported fleetd."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.warm_start import warm_server


@pytest.fixture(scope="session", autouse=True)
def warm_starts() -> Iterator[None]:
    with warm_server():
        yield
