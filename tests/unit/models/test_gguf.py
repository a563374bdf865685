"""The GGUF reader: valid files are read correctly, every invalid one raises one sentence, in bounded time and memory."""

from __future__ import annotations

import errno
import os
import resource
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench import tiny_gguf
from fleetd.errors import EngineError
from fleetd.models.formats import gguf
from fleetd.models.formats.gguf import GgufError
from tests.support import gguf_bytes as raw


def written(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


# -- valid files -------------------------------------------------------------------------------------------------------


def test_read_returns_what_was_written(tmp_path: Path) -> None:
    shape = tiny_gguf.TinyModel(layers=3, embedding=64, heads=4, kv_heads=2, context=2048, seed=7)
    path = tiny_gguf.write(tmp_path / "tiny.gguf", shape)
    header = gguf.read(path)
    assert header.architecture == "llama"
    assert header.version == 3
    assert header.number("block_count") == 3
    assert header.number("context_length") == 2048
    assert header.number("attention.head_count_kv") == 2
    assert header.vocabulary == shape.vocabulary == header.lengths["tokenizer.ggml.tokens"]
    assert header.weight_bytes == shape.weight_bytes
    assert header.data_offset + header.weight_bytes <= path.stat().st_size
    assert {tensor.name for tensor in header.tensors} == {name for name, _ in shape.tensors()}
    assert "tokenizer.ggml.tokens" not in header.keys  # counted, not built


def test_block_sizes_agree_with_reference() -> None:
    from gguf.constants import GGML_QUANT_SIZES

    for kind, size in GGML_QUANT_SIZES.items():
        assert gguf.BLOCKS[int(kind)] == tuple(size), kind


def test_read_every_scalar_and_array_type(tmp_path: Path) -> None:
    values = {
        raw.U8: 200, raw.I8: -100, raw.U16: 60_000, raw.I16: -30_000, raw.U32: 4_000_000_000, raw.I32: -2_000_000_000,
        raw.F32: 0.5, raw.BOOL: True, raw.STRING: "word", raw.U64: 2**63, raw.I64: -(2**62), raw.F64: 0.1,
    }  # fmt: skip
    pairs = [raw.pair(f"s{kind}", kind, value) for kind, value in values.items()]
    pairs += [raw.array(f"a{kind}", kind, [value, value]) for kind, value in values.items()]
    header = gguf.read(written(tmp_path, raw.model(pairs)))
    for kind, value in values.items():
        assert header.keys[f"s{kind}"] == value
        assert header.lengths[f"a{kind}"] == 2
        if kind != raw.STRING:
            assert header.keys[f"a{kind}"] == (value, value)


def test_read_per_layer_numbers_and_long_values(tmp_path: Path) -> None:
    pairs = [
        *raw.llama()[:1],
        raw.array("llama.attention.head_count_kv", raw.I32, [1, 2, 3]),
        raw.array("long.numbers", raw.F32, [0.0] * 5000),
        raw.pair("long.text", raw.STRING, "x" * 70000),
        raw.pair("llama.block_count", raw.U32, 3),
    ]
    header = gguf.read(written(tmp_path, raw.model(pairs)))
    assert header.numbers("attention.head_count_kv") == (1, 2, 3)
    assert header.number("attention.head_count_kv") is None
    assert header.number("block_count") == 3
    assert header.lengths["long.numbers"] == 5000
    assert "long.numbers" not in header.keys
    assert "long.text" not in header.keys


def test_read_unknown_tensor_type_counts_by_offsets(tmp_path: Path) -> None:
    rows = [raw.tensor("a", [64], 99, 0), raw.tensor("b", [64], 0, 128), raw.tensor("c", [1], 99, 384)]
    header = gguf.read(written(tmp_path, raw.model(raw.llama(), rows, data=400)))
    assert [tensor.size_bytes for tensor in header.tensors] == [128, 256, 16]


@pytest.mark.parametrize(
    ("name", "count"),
    [("m-00001-of-00003.gguf", 3), ("m-00002-of-00003.gguf", 3), ("m.gguf", 1), ("m-1-of-3.gguf", 1), ("m-00001-of-00000.gguf", 1),
     ("m-00001-of-99999.gguf", 1)],
)  # fmt: skip
def test_shards_count_by_name(name: str, count: int) -> None:
    found = gguf.shards(Path("/models") / name)
    assert len(found) == count
    assert found[0].startswith("/models/m")
    if count == 3:
        assert found == tuple(f"/models/m-0000{number}-of-00003.gguf" for number in (1, 2, 3))


def test_read_all_rejects_part_of_other_model(tmp_path: Path) -> None:
    paths = [Path(name) for name in gguf.shards(tmp_path / "m-00001-of-00002.gguf")]
    for number, path in enumerate(paths):
        pairs = [*raw.llama(), raw.pair("split.no", raw.U16, number), raw.pair("split.count", raw.U16, 2)]
        path.write_bytes(raw.model(pairs, [raw.tensor("t", [32], 0, 0)], data=128))
    assert sum(header.weight_bytes for header in gguf.read_all(paths)) == 256
    paths[1].write_bytes(paths[0].read_bytes())
    with pytest.raises(GgufError, match="part 0"):
        gguf.read_all(paths)


def test_read_large_vocabulary_is_quick_and_small(tmp_path: Path) -> None:
    tokens = b"".join(raw.text(f"token{number}") for number in range(150_000))
    head = raw.text("tokenizer.ggml.tokens") + struct.pack("<IIQ", raw.ARRAY, raw.STRING, 150_000) + tokens
    scores = raw.text("tokenizer.ggml.scores") + struct.pack("<IIQ", raw.ARRAY, raw.F32, 150_000) + bytes(600_000)
    merges = raw.text("tokenizer.ggml.merges") + struct.pack("<IIQ", raw.ARRAY, raw.STRING, 150_000) + tokens
    path = written(tmp_path, raw.model([*raw.llama(), head, scores, merges]))

    def took_s() -> float:
        begun = time.process_time()
        assert gguf.read(path).vocabulary == 150_000
        return time.process_time() - begun

    assert min(took_s() for _ in range(3)) < 0.2
    assert peak_bytes(path) < 60 * 2**20


def peak_bytes(path: Path) -> int:
    """Return the peak memory of a process that only reads a header. Linux's rusage would include its parent's before exec."""
    program = (
        "import resource, sys; from pathlib import Path; from fleetd.models.formats import gguf\n"
        f"gguf.read(Path({str(path)!r}))\n"
        "status = Path('/proc/self/status')\n"
        "rows = dict(line.split(':', 1) for line in status.read_text().splitlines()) if status.exists() else {}\n"
        "print(int(rows['VmHWM'].split()[0]) * 1024 if rows else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    return int(done.stdout)


# -- invalid files ----------------------------------------------------------------------------------------------------

HUGE = 2**63
NESTED = raw.text("k") + struct.pack("<IIQ", raw.ARRAY, raw.ARRAY, 1) + struct.pack("<IQ", raw.U8, 0)
ENDLESS = raw.text("k") + struct.pack("<IIQ", raw.ARRAY, raw.STRING, 2) + struct.pack("<QQ", HUGE, 1) + bytes(64)
BAD = {
    "empty": (b"", "0 bytes"),
    "short": (b"GGUF\x03\x00\x00\x00", "only 8 bytes"),
    "magic": (raw.header(magic=b"GGML"), "starts with b'GGML'"),
    "html": (b"<!DOCTYPE html><html>not found</html>", "starts with"),
    "version 0": (raw.header(version=0), "version 0"),
    "version 1": (raw.header(version=1), "version 1 is older"),
    "version 4": (raw.header(version=4), "version 4 is newer"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "many keys": (raw.header(keys=HUGE), "keys"),
    "more keys than bytes": (raw.header(keys=9_999), "ends after 24 bytes"),
    "many tensors": (b"GGUF" + struct.pack("<IQQ", 3, HUGE, 0), "tensors"),
    "long key": (raw.header(keys=1) + struct.pack("<Q", HUGE), "a name of"),
    "key past the end": (raw.header(keys=1) + struct.pack("<Q", 60_000), "ends after"),
    "unknown type": (raw.header([raw.text("k") + struct.pack("<I", 77) + bytes(8)]), "unknown type 77"),
    "long text": (raw.header([raw.text("k") + struct.pack("<IQ", raw.STRING, HUGE)]), "bytes where only"),
    "text past the end": (raw.header([raw.text("k") + struct.pack("<IQ", raw.STRING, 500)]), "ends after"),
    "long array": (raw.header([raw.array("k", raw.U64, [], count=HUGE)]), "bytes where only"),
    "short array": (raw.header([raw.array("k", raw.U64, [1], count=4000)]), "ends after"),
    "many texts": (raw.header([raw.array("k", raw.STRING, [], count=HUGE)]), "texts"),
    "texts past the end": (raw.header([raw.array("k", raw.STRING, ["a"], count=100)]), "texts"),
    "endless text": (raw.header([ENDLESS]), "ends after the file|ends after"),
    "nested": (raw.header([NESTED]), "array of arrays"),
    "array of unknown": (raw.header([raw.text("k") + struct.pack("<IIQ", raw.ARRAY, 55, 1) + bytes(8)]), "array of the unknown type"),
    "dimensions": (raw.header([], [raw.tensor("t", [1] * 5, 0, 0)]), "5 dimensions"),
    "no dimension": (raw.header([], [raw.tensor("t", [], 0, 0)]), "0 dimensions"),
    "huge tensor": (raw.model([], [raw.tensor("t", [HUGE, HUGE, HUGE, HUGE], 0, 0)]), "cut off"),
    "huge offset": (raw.model([], [raw.tensor("t", [1], 0, 2**64 - 1)]), "cut off"),
    "cut weights": (raw.model([], [raw.tensor("t", [64], 0, 0)], data=255), "cut off or still being written"),
    "no weights": (raw.header([], [raw.tensor("t", [64], 0, 0)]), "before its tensors|cut off"),
    "alignment 0": (raw.model([raw.pair("general.alignment", raw.U32, 0)]), "alignment of 0"),
    "alignment 3": (raw.model([raw.pair("general.alignment", raw.U32, 3)]), "alignment of 3"),
    "alignment text": (raw.model([raw.pair("general.alignment", raw.STRING, "x")]), "alignment of 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_read_invalid_file_raises(case: str, tmp_path: Path) -> None:
    data, message = BAD[case]
    path = written(tmp_path, data)
    with pytest.raises(GgufError, match=message) as caught:
        gguf.read(path)
    assert isinstance(caught.value, EngineError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_read_not_a_file_raises(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    for path, message in (
        (tmp_path, "folder"),
        (fifo, "FIFO"),
        (tmp_path / "absent", "No such file"),
        (Path("/dev/zero"), "device"),
    ):
        with pytest.raises(GgufError, match=message):
            gguf.read(path)
    with pytest.raises(GgufError, match="not a path"):
        gguf.read(Path("a\0b"))


@pytest.mark.parametrize("number", [errno.EACCES, errno.EIO, errno.ESTALE])
def test_read_unreadable_file_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    path = written(tmp_path, small())

    def broken(*args: object) -> bytes:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pread", broken)
    with pytest.raises(GgufError, match=os.strerror(number)) as caught:
        gguf.read(path)
    assert caught.value.recoverable


def small() -> bytes:
    pairs = [
        *raw.llama(),
        raw.array("tokenizer.ggml.tokens", raw.STRING, ["a", "bc", "def"]),
        raw.array("n", raw.U32, [1, 2, 3]),
    ]
    return raw.model(
        pairs, [raw.tensor("token_embd.weight", [64, 3], 1, 0), raw.tensor("output.weight", [64], 0, 384)], data=640
    )


def test_read_every_truncation_raises(tmp_path: Path) -> None:
    data = small()
    path = written(tmp_path, data)
    gguf.read(path)
    for length in range(len(data) - 1, -1, -1):
        os.truncate(path, length)
        with pytest.raises(GgufError):
            gguf.read(path)


def test_read_every_flipped_byte_reads_or_raises(tmp_path: Path) -> None:
    data = bytearray(small())
    path = written(tmp_path, bytes(data))
    end = gguf.read(path).data_offset
    with path.open("r+b", buffering=0) as file:
        for offset in range(end):
            for flip in (0xFF, 0x01, 0x80):
                os.pwrite(file.fileno(), bytes([data[offset] ^ flip]), offset)
                try:
                    gguf.read(path)
                except GgufError:
                    pass
            os.pwrite(file.fileno(), data[offset : offset + 1], offset)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=400), tensors=st.integers(0, 2**64 - 1), keys=st.integers(0, 2**64 - 1))
def test_read_noise_after_header_never_crashes(tmp_path: Path, body: bytes, tensors: int, keys: int) -> None:
    path = written(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + body)
    try:
        gguf.read(path)
    except GgufError:
        pass


NAMES, KINDS, NUMBERS = st.text(max_size=9), st.integers(0, 60), st.integers(0, 2**64 - 1)
CHUNKS = st.one_of(
    st.builds(
        lambda key, kind, value: raw.text(key) + struct.pack("<IQ", kind, value), NAMES, st.integers(0, 14), NUMBERS
    ),
    st.builds(
        lambda key, kind, count: raw.text(key) + struct.pack("<IIQ", 9, kind, count), NAMES, st.integers(0, 14), NUMBERS
    ),
    st.builds(raw.tensor, NAMES, st.lists(NUMBERS, max_size=5), KINDS, NUMBERS),
    st.binary(max_size=40),
)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(chunks=st.lists(CHUNKS, max_size=8), tensors=st.integers(0, 4), keys=st.integers(0, 6))
def test_read_plausible_noise_never_crashes(tmp_path: Path, chunks: list[bytes], tensors: int, keys: int) -> None:
    path = written(tmp_path, b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + b"".join(chunks))
    try:
        header = gguf.read(path)
    except GgufError:
        return
    assert header.weight_bytes <= header.file_bytes * max(1, len(header.tensors))


def test_read_sparse_huge_file_is_quick_and_small(tmp_path: Path) -> None:
    """A terabyte of zeros is a terabyte of empty strings: the count is checked before they are skipped."""
    head = raw.header([raw.array("k", raw.STRING, [], count=10**9)])
    path = written(tmp_path, head)
    os.truncate(path, 2**36)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.process_time()
    with pytest.raises(GgufError, match="texts"):
        gguf.read(path)
    assert time.process_time() - begun < 1
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 * 1024
