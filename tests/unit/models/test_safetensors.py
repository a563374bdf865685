"""Hugging Face model folders: sizes by hand-checked numbers, and every broken file raises one sentence."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fleetd.models.formats import safetensors
from fleetd.models.formats.safetensors import SafetensorsError

LLAMA_8B = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
    "vocab_size": 128256, "max_position_embeddings": 8192, "torch_dtype": "bfloat16",
}  # fmt: skip


def tensors(*sizes: int) -> bytes:
    rows, at = {"__metadata__": {"format": "pt"}}, 0
    for number, size in enumerate(sizes):
        rows[f"t{number}"] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}  # type: ignore[dict-item]
        at += size
    head = json.dumps(rows).encode()
    return len(head).to_bytes(8, "little") + head + bytes(at)


def folder(path: Path, config: Any = None, **files: bytes) -> Path:
    (path / "config.json").write_text(json.dumps(LLAMA_8B if config is None else config))
    for name, data in files.items():
        (path / f"{name}.safetensors").write_bytes(data)
    return path


def test_read_folder_adds_up_tensors(tmp_path: Path) -> None:
    found = safetensors.read_folder(folder(tmp_path, model=tensors(100, 28), consolidated=tensors(128)))
    assert found.weight_bytes == 128
    assert len(found.files) == 1


def test_read_folder_counts_only_files_of_index(tmp_path: Path) -> None:
    folder(tmp_path, a=tensors(10), b=tensors(20), stray=tensors(500))
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors", "z": "a.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert safetensors.read_folder(tmp_path).weight_bytes == 30


def test_read_folder_uses_text_config(tmp_path: Path) -> None:
    found = safetensors.read_folder(
        folder(tmp_path, {"hidden_size": 1, "text_config": {"hidden_size": 64}}, m=tensors(1))
    )
    assert found.number("hidden_size") == 64


BAD = {
    "empty": b"",
    "short": b"\x01\x02",
    "endless header": (2**63).to_bytes(8, "little") + b"{}",
    "no JSON": (2).to_bytes(8, "little") + b"xx",
    "not an object": (2).to_bytes(8, "little") + b"[]",
    "nested": (40_000).to_bytes(8, "little") + b"[" * 40_000,
    "no offsets": (8).to_bytes(8, "little") + b'{"t":{}}',
    "cut off": tensors(100)[:-1],
    "backwards": (29).to_bytes(8, "little") + b'{"t":{"data_offsets":[9, 1]}}',
    "text offsets": (33).to_bytes(8, "little") + b'{"t":{"data_offsets":["0", "1"]}}',
}


@pytest.mark.parametrize("case", BAD)
def test_tensor_bytes_invalid_file_raises(case: str, tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(BAD[case])
    with pytest.raises(SafetensorsError) as caught:
        safetensors.tensor_bytes(path)
    assert str(path) in str(caught.value)
    assert len(str(caught.value)) < 600


def test_read_folder_invalid_folder_raises(tmp_path: Path) -> None:
    with pytest.raises(SafetensorsError, match="not a folder"):
        safetensors.read_folder(tmp_path / "absent")
    with pytest.raises(SafetensorsError, match="No such file"):
        safetensors.read_folder(tmp_path)
    with pytest.raises(SafetensorsError, match=r"no \.safetensors"):
        safetensors.read_folder(folder(tmp_path))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../../etc/passwd"}}))
    with pytest.raises(SafetensorsError, match="outside"):
        safetensors.read_folder(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(SafetensorsError, match="weight_map"):
        safetensors.read_folder(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(SafetensorsError, match="not a JSON object"):
        safetensors.read_folder(tmp_path)


def test_read_folder_fifo_raises_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.json")
    with pytest.raises(SafetensorsError, match="not a regular file"):
        safetensors.read_folder(tmp_path)


def test_tensor_bytes_every_truncation_raises(tmp_path: Path) -> None:
    path = tmp_path / "m.safetensors"
    data = tensors(8, 4)
    path.write_bytes(data)
    assert safetensors.tensor_bytes(path) == 12
    for length in range(len(data) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(SafetensorsError):
            safetensors.tensor_bytes(path)
