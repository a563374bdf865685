"""The registry: unknown names, engines of other packages, and the check against the contract."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetd.core.data.specs import Capabilities
from fleetd.engines import registry
from fleetd.engines.generic.engine import GenericEngine
from fleetd.errors import EngineError

SOURCE = """
from fleetd.engines.generic.engine import GenericEngine
class Mine(GenericEngine):
    name = "mine"
class Half:
    name = "half"
ENGINE = Mine()
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Install a package with engines, as the files that an installer writes."""
    (tmp_path / "other_engines.py").write_text(SOURCE)
    info = tmp_path / "other_engines-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: other-engines\nVersion: 1.0\n")
    lines = [
        "[fleetd.engines]",
        "mine = other_engines:ENGINE",
        "maker = other_engines:Mine",
        "half = other_engines:Half",
    ]
    lines += ["gone = other_engines:Absent", "vllm = other_engines:ENGINE"]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry.load.cache_clear()
    yield
    registry.load.cache_clear()
    sys.modules.pop("other_engines", None)


@pytest.mark.parametrize(
    ("name", "near"), [("lamacpp", "llamacpp"), ("vLLM", "vllm"), ("olama", "ollama"), ("", None), ("\0", None)]
)
def test_load_unknown_name_names_the_nearest(name: str, near: str | None) -> None:
    with pytest.raises(EngineError) as caught:
        registry.load(name)
    assert "llamacpp, lmstudio, ollama, process, vllm" in str(caught.value)
    assert (near is None) == (caught.value.hint is None)
    assert near is None or near in str(caught.value.hint)
    assert not caught.value.recoverable


@pytest.mark.usefixtures("installed")
def test_load_engine_of_another_package() -> None:
    assert "mine" in registry.names()
    assert registry.load("mine").name == "mine"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "text"),
    [("vllm", "other-engines registers an engine named 'vllm'"), ("half", "lacks capabilities"), ("gone", "cannot be loaded"),
     ("maker", "calls itself 'mine'")],
)  # fmt: skip
def test_load_invalid_entry_point_is_an_error(name: str, text: str) -> None:
    with pytest.raises(EngineError, match=text) as caught:
        registry.load(name)
    assert "other-engines" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"startup": object()}, "it lacks startup.phase, startup.learned"),
        ({"server": object()}, "it lacks server.load, server.unload, server.loaded, server.canonical_name"),
        ({"capabilities": Capabilities(many_models=True)}, "capabilities.many_models must be set exactly where"),
        ({"launch": None}, "launch is not a method"),
    ],
)
def test_contract_problems_names_what_is_wrong(change: dict[str, object], problem: str) -> None:
    engine = type("Changed", (GenericEngine,), change)()
    assert any(one.startswith(problem) for one in registry.contract_problems(engine))


def test_contract_problems_of_built_in_engine_is_empty() -> None:
    for name in registry.BUILT_IN:
        assert registry.contract_problems(registry.load(name)) == []


def test_recall_of_process_loads_no_pydantic() -> None:
    program = (
        "import sys; from fleetd.engines.registry import recall; recall('process'); print('pydantic' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"
