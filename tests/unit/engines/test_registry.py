"""Finding engines: unknown names, names of other packages, and packages that would replace one of ours."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetd.engines import registry
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
    """Install a package that brings engines, by the files that an installer would leave."""
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
def test_unknown_names(name: str, near: str | None) -> None:
    with pytest.raises(EngineError) as caught:
        registry.load(name)
    assert "llamacpp, lmstudio, ollama, process, vllm" in str(caught.value)
    assert (near is None) == (caught.value.hint is None)
    assert near is None or near in str(caught.value.hint)
    assert not caught.value.recoverable


@pytest.mark.usefixtures("installed")
def test_other_packages_add_engines() -> None:
    assert "mine" in registry.names()
    assert registry.load("mine").name == "mine"


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("name", "said"),
    [("vllm", "other-engines registers an engine named 'vllm'"), ("half", "lacks capabilities"), ("gone", "cannot be loaded"),
     ("maker", "calls itself 'mine'")],
)  # fmt: skip
def test_other_packages_cannot_break_or_replace(name: str, said: str) -> None:
    with pytest.raises(EngineError, match=said) as caught:
        registry.load(name)
    assert "other-engines" in str(caught.value)
