"""Folders for sockets."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def short(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder whose path is short enough for a socket."""
    return tmp_path_factory.mktemp("s")
