"""The model writer: the announced sizes, equal bytes for equal seeds, and errors in one sentence."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bench import tiny_gguf
from fleetd.models.formats import gguf


def test_write_equal_arguments_give_equal_bytes(tmp_path: Path) -> None:
    one, two = (tiny_gguf.write(tmp_path / name, seed=5) for name in ("a.gguf", "b.gguf"))
    other = tiny_gguf.write(tmp_path / "c.gguf", seed=6)
    assert one.read_bytes() == two.read_bytes() != other.read_bytes()
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.parametrize("megabytes", [1, 3, 8, 30])
def test_sized_is_close_to_size(tmp_path: Path, megabytes: float) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", tiny_gguf.sized(megabytes))
    assert path.stat().st_size == pytest.approx(megabytes * 1e6, rel=0.15)


@pytest.mark.parametrize("megabytes", [100, 300, 1000])
def test_sized_large_is_close_to_size(megabytes: float) -> None:
    assert tiny_gguf.sized(megabytes).weight_bytes == pytest.approx(megabytes * 1e6, rel=0.1)


def test_write_tied_embeddings(tmp_path: Path) -> None:
    header = gguf.read(tiny_gguf.write(tmp_path / "m.gguf", tied=True))
    assert "output.weight" not in {tensor.name for tensor in header.tensors}


def test_main_writes_model(tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        line = [sys.executable, "-m", "bench.tiny_gguf", *words]
        return subprocess.run(line, capture_output=True, text=True, timeout=60, check=False)

    done = run(str(tmp_path / "sub" / "m.gguf"), "--layers", "3", "--embedding", "32", "--kv-heads", "4")
    assert done.returncode == 0, done.stderr
    assert gguf.read(tmp_path / "sub" / "m.gguf").number("block_count") == 3
    for words in (["--embedding", "33"], ["--layers", "0"], ["--heads", "3"]):
        wrong = run(str(tmp_path / "w.gguf"), *words)
        assert wrong.returncode == 2
        assert wrong.stderr.startswith("tiny_gguf: ")
