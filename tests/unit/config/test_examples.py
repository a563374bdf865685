"""The shipped examples load and keep their promises."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.config.load import load
from fleetd.config.schema.model import EngineModel, HeldModel, RouteModel

ROOT = Path(__file__).parents[3]
EXAMPLES = [*sorted((ROOT / "examples").glob("*.yaml")), *ROOT.glob("fleet.yaml")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_loads_and_names_the_schema(path: Path) -> None:
    loaded = load(path, {})
    for file in loaded.files:
        first = file.read_text("utf-8").splitlines()[0]
        assert first.startswith("# yaml-language-server: $schema=")
        assert (
            file.parent / first.partition("=")[2]
        ).resolve() == ROOT / "docs" / "fleet.schema.json" or "://" in first


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_promises_no_ollama_api_on_the_gateway(path: Path) -> None:
    config = load(path, {}).config
    gateway = str(config.gateway.listen.port)
    for entry in config.processes().values():
        for name, value in entry.env.items():
            assert gateway not in value or (name != "OLLAMA_HOST" and "/api" not in value), name
    lines = path.read_text("utf-8").splitlines()
    assert [line for line in lines if gateway in line and "/api/" in line] == []


@pytest.mark.parametrize("path", sorted((ROOT / "examples").glob("minimal-*.yaml")), ids=lambda path: path.name)
def test_minimal_example_has_at_most_20_lines(path: Path) -> None:
    assert len(path.read_text("utf-8").splitlines()) <= 20


def test_mac_studio_example_holds_its_models() -> None:
    config = load(ROOT / "examples" / "mac-studio.yaml", {}).config
    ollama = config.instances["ollama"]
    assert (ollama.port, ollama.replicas, ollama.requires) == (11434, 3, ("/Volumes/BOWIE",))
    voices = [
        model
        for model in config.models.values()
        if isinstance(model, HeldModel) and (model.from_ or "").startswith("/Volumes/BOWIE")
    ]
    assert len(voices) == 32
    assert all(voice.instance == ("ollama",) for voice in voices)
    assert config.services["ai-bot"].depends_on == {"ollama": "ready"}


def test_gpu_box_example_fits_its_card() -> None:
    config = load(ROOT / "examples" / "gpu-box.yaml", {}).config
    coder, general, chat = config.models["coder"], config.models["general"], config.models["chat"]
    assert isinstance(coder, EngineModel)
    assert isinstance(general, HeldModel)
    assert isinstance(chat, RouteModel)
    assert coder.options["gpu_memory_utilization"] <= 0.85
    assert isinstance(coder.memory, dict)
    assert isinstance(general.memory, dict)
    budget = config.devices["gpu0"].budget
    assert budget is not None
    assert coder.memory["gpu0"] + general.memory["gpu0"] <= budget.of(int(15.9 * 2**30))
    assert [(one.to, one.weight) for one in chat.route] == [("coder", 90), ("general", 10)]
    assert coder.fallback == ("general",)
