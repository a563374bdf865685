"""What `fleetctl init` writes runs: from model files to an answer of the real engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from bench.tiny_gguf import write
from tests.support.cli import fleetctl
from tests.support.daemon import fleetd

pytestmark = pytest.mark.real_engine
pytest.importorskip("xllamacpp")


def test_written_fleet_serves_its_models(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    write(models / "it's $HOME #1.gguf", layers=2, seed=1, name="odd")
    written = fleetctl("init", str(models), "--print", HOME=str(tmp_path))
    assert written.code == 0, written.err
    document = yaml.safe_load(written.out)
    (name,) = document["models"]
    body = "".join(written.out.partition("\ndevices:")[1:])
    with fleetd(tmp_path, body) as daemon:
        daemon.start()
        assert daemon.chat(name, max_tokens=4).status == 200
