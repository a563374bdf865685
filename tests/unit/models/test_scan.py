"""Finding models in a folder: which files count, the proposed entries, and the bounds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.tiny_gguf import write
from fleetd.errors import EngineError
from fleetd.models import scan as scan_module
from fleetd.models.scan import entries, scan


def test_scan_finds_models_and_proposes_entries(tmp_path: Path) -> None:
    deep = tmp_path / "a b" / "TSC-ULYSSES@f16"
    deep.mkdir(parents=True)
    one = write(deep / "TSC ULYSSES_f16.gguf")
    same_name = write(tmp_path / "tsc-ulysses-f16.gguf", seed=2)
    write(tmp_path / "mmproj-x.gguf")
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    (tmp_path / "notes.txt").write_text("x")
    hub = tmp_path / "qwen"
    hub.mkdir()
    (hub / "config.json").write_text(json.dumps({"architectures": ["Qwen2"], "max_position_embeddings": 64}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [5], "data_offsets": [0, 10]}}).encode()
    (hub / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(10))
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)

    result = scan(tmp_path)
    found = {model.path: model for model in result.models}
    assert set(found) == {one, same_name, hub}
    assert {model.key for model in result.models} == {"tsc-ulysses-f16", "tsc-ulysses-f16-2", "qwen"}
    assert found[same_name].projector == tmp_path / "mmproj-x.gguf"
    assert found[one].projector is None
    assert (found[one].architecture, found[one].context_length) == ("llama", 4096)
    assert found[one].size_bytes == one.stat().st_size
    assert (found[hub].architecture, found[hub].size_bytes) == ("Qwen2", 10)
    assert any("broken.gguf" in note for note in result.notes)

    held = entries(result.models, "ollama")
    assert held[found[one].key] == {"instance": "ollama", "from": str(one)}
    assert held["qwen"] == {"engine": "vllm", "options": {"model": str(hub)}}
    alone = entries(result.models)
    assert alone[found[one].key] == {"engine": "llamacpp", "options": {"model": str(one)}}


def test_scan_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scan_module, "MAX_DEPTH", 2)
    deep = tmp_path / "1" / "2" / "3" / "4"
    deep.mkdir(parents=True)
    write(deep / "x.gguf")
    result = scan(tmp_path)
    assert result.models == ()
    assert any("not searched deeper" in note for note in result.notes)
    monkeypatch.setattr(scan_module, "MAX_MODELS", 1)
    for number in range(3):
        write(tmp_path / f"{number}.gguf")
    assert len(scan(tmp_path).models) == 1


def test_scan_no_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="not a folder"):
        scan(tmp_path / "absent")
