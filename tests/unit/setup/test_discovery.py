"""What is found on a machine: programs, servers and files, the odd ones included."""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from bench.tiny_gguf import write
from fleetd.host.process.ask import Answered, ask
from fleetd.models.scan import scan
from fleetd.setup import machine, programs, servers
from fleetd.setup.bounded import together
from tests.support import gguf_bytes as gguf


def script(path: Path, body: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


# -- programs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text", "version"),
    [
        ("ollama", "ollama version is 0.33.0-rc2", "0.33.0-rc2"),
        ("ollama", "Warning: could not connect\nWarning: client version is 0.24.0\n", "0.24.0"),
        ("llama-server", "version: 6123 (ab12cd)\nbuilt with gcc 13.2.0", "b6123"),
        ("lms", "no numbers here", None),
    ],
)
def test_version_in_reads_what_programs_print(name: str, text: str, version: str | None) -> None:
    assert programs.version_in(name, text) == version


def test_lists_gpu_ignores_a_machine_without_one() -> None:
    assert programs.lists_gpu("Available devices:\n  CUDA0: NVIDIA L4 (22478 MiB, 22310 MiB free)\n")
    assert not programs.lists_gpu("Available devices:\n")


def test_find_searches_path_and_the_installers_places(tmp_path: Path) -> None:
    script(tmp_path / "bin" / "ollama", "echo ollama version is 0.35.1")
    found = programs.find("ollama", {"PATH": str(tmp_path / "bin")})
    assert found == programs.Installed("ollama", str(tmp_path / "bin" / "ollama"), "0.35.1")
    assert programs.find("llama-server", {"PATH": str(tmp_path / "bin")}) is None


def test_vllm_version_is_read_without_running_it(tmp_path: Path) -> None:
    program = script(tmp_path / "v" / "bin" / "vllm", "exit 1")
    (tmp_path / "v" / "lib" / "python3.12" / "site-packages" / "vllm-0.20.1.dist-info").mkdir(parents=True)

    def never(argv: tuple[str, ...], limit_s: float) -> Answered:
        raise AssertionError(argv)

    found = programs.find("vllm", {"PATH": str(program.parent)}, never)
    assert found is not None
    assert found.version == "0.20.1"


def test_ask_kills_a_program_that_hangs(tmp_path: Path) -> None:
    program = script(tmp_path / "slow", f"echo $$ > {tmp_path}/pid; echo begun; exec sleep 600")
    before = time.monotonic()
    answer = ask((str(program),), 0.5)
    assert (answer.code, answer.text) == (None, "begun\n")
    assert time.monotonic() - before < 5.0
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
    assert ask((str(tmp_path / "missing"),), 1.0).code is None


def test_together_returns_what_is_there_in_time() -> None:
    release = threading.Event()

    def broken() -> None:
        raise OSError("no")

    found = together({"slow": release.wait, "good": lambda: 1, "bad": broken}, 0.3)
    release.set()
    assert found["good"] == 1
    assert isinstance(found["bad"], OSError)
    assert "slow" not in found


# -- servers -------------------------------------------------------------------------------------------------------------


@contextmanager
def server(routes: Mapping[str, Any], status: int = 200) -> Iterator[int]:
    """Serve JSON by path on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            body = json.dumps(routes.get(self.path, {"error": "unknown"})).encode()
            self.send_response(status if self.path in routes else 404)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            return

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running.server_port
        finally:
            running.shutdown()
            thread.join()


def test_look_finds_ollama_and_its_local_models() -> None:
    tags = {
        "models": [
            {"name": "llama3.2:3b", "size": 5, "details": {"families": ["llama"]}},
            {"name": "bge-m3:latest", "size": 5, "details": {"families": ["bert"]}},
            {"name": "big-cloud", "remote_host": "https://ollama.com"},
            {"name": "bad\nname"},
            "nonsense",
        ]
    }
    with server({"/api/version": {"version": "0.35.0"}, "/api/tags": tags}) as port:
        found = servers.look(port)
    assert found is not None
    assert (found.engine, found.version) == ("ollama", "0.35.0")
    assert found.models == (servers.Listed("llama3.2:3b", 5), servers.Listed("bge-m3:latest", 5, True))


def test_look_distinguishes_lmstudio_from_others() -> None:
    listed = {"object": "list", "data": [{"id": "qwen", "owned_by": "vllm"}, {"id": "nomic-embed"}]}
    with server({"/lmstudio-greeting": {"lmstudio": True}, "/v1/models": listed}) as port:
        found = servers.look(port)
    assert found is not None
    assert found.engine == "lmstudio"
    with server({"/v1/models": listed}) as port:
        found = servers.look(port)
    assert found is not None
    assert (found.engine, found.owner) == ("external", "vllm")
    assert found.models == (servers.Listed("qwen"), servers.Listed("nomic-embed", None, True))


@pytest.mark.parametrize("data", [{"hello": 1}, [], "text", {"data": "no list"}, None])
def test_look_ignores_a_server_of_something_else(data: Any) -> None:
    with server({"/v1/models": data, "/api/version": data}) as port:
        assert servers.look(port) is None


def test_look_reports_a_server_that_wants_a_key() -> None:
    with server({"/v1/models": {}}, status=401) as port:
        found = servers.look(port)
    assert found == servers.Running("external", port, locked=True)


def test_look_gives_up_on_a_silent_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "ANSWER_S", 0.1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        before = time.monotonic()
        assert servers.look(silent.getsockname()[1]) is None
    assert time.monotonic() - before < 5.0


# -- files ---------------------------------------------------------------------------------------------------------------


def keys(folder: Path) -> list[str]:
    return sorted(model.key for model in scan(folder).models)


def header(path: Path, *pairs: bytes) -> None:
    path.write_bytes(gguf.model(pairs, [gguf.tensor("token_embd.weight", [8, 8], 0, 0)], data=256))


def test_scan_lists_a_file_once_whatever_links_to_it(tmp_path: Path) -> None:
    write(tmp_path / "one.gguf", layers=2, seed=1, name="one")
    below = tmp_path / "below"
    below.mkdir()
    (below / "soft.gguf").symlink_to(tmp_path / "one.gguf")
    (below / "dangling.gguf").symlink_to(tmp_path / "missing")
    (below / "loop").symlink_to(tmp_path)
    os.link(tmp_path / "one.gguf", below / "hard.gguf")
    os.mkfifo(tmp_path / "pipe.gguf")
    assert keys(tmp_path) == ["one"]


def test_scan_leaves_out_what_is_no_model(tmp_path: Path) -> None:
    architecture = gguf.pair("general.architecture", gguf.STRING, "llama")
    header(tmp_path / "lora.gguf", architecture, gguf.pair("general.type", gguf.STRING, "adapter"))
    (tmp_path / "vocab.gguf").write_bytes(gguf.model([architecture]))
    (tmp_path / "broken.gguf").write_bytes(b"GGUF")
    found = scan(tmp_path)
    assert found.models == ()
    notes = " ".join(found.notes)
    assert "type 'adapter'" in notes
    assert "a vocabulary" in notes
    assert "only 4 bytes" in notes


def test_scan_gives_a_projector_to_models_of_its_width(tmp_path: Path) -> None:
    def model(name: str, width: int) -> None:
        pairs = (
            gguf.pair("general.architecture", gguf.STRING, "llama"),
            gguf.pair("llama.embedding_length", gguf.U32, width),
            gguf.pair("llama.block_count", gguf.U32, 1),
        )
        header(tmp_path / name, *pairs)

    model("a.gguf", 64)
    model("b.gguf", 48)
    projector = (
        gguf.pair("general.architecture", gguf.STRING, "clip"),
        gguf.pair("clip.vision.projection_dim", gguf.U32, 64),
    )
    header(tmp_path / "vision.gguf", *projector)
    found = {model.key: model.projector for model in scan(tmp_path).models}
    assert found == {"a": tmp_path / "vision.gguf", "b": None}


def test_scan_names_an_opaque_file_by_its_header(tmp_path: Path) -> None:
    for name in ("model-Q4_K_M.gguf", "日本.gguf", "plain.gguf"):
        folder = tmp_path / name
        folder.mkdir()
        header(
            folder / name,
            gguf.pair("general.architecture", gguf.STRING, "llama"),
            gguf.pair("general.name", gguf.STRING, "Tiny Model"),
        )
    assert keys(tmp_path) == ["plain", "tiny-model", "tiny-model-2"]


def test_scan_recognises_embedding_and_reranking_models(tmp_path: Path) -> None:
    for name, pooling in (("embed", 1), ("rank", 4)):
        pairs = (
            gguf.pair("general.architecture", gguf.STRING, "qwen3"),
            gguf.pair("qwen3.pooling_type", gguf.U32, pooling),
        )
        header(tmp_path / f"{name}.gguf", *pairs)
    found = {model.key: (model.embedding, model.rerank) for model in scan(tmp_path).models}
    assert found == {"embed": (True, False), "rank": (True, True)}


def test_scan_stops_at_its_time_limit(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"m{number}.gguf", layers=1, seed=1, name="m")
    found = scan(tmp_path, limit_s=-1.0)
    assert found.models == ()
    assert "stopped at" in found.notes[0]


def test_scan_reports_a_split_model_that_lacks_a_part(tmp_path: Path) -> None:
    header(tmp_path / "m-00001-of-00002.gguf", gguf.pair("general.architecture", gguf.STRING, "llama"))
    found = scan(tmp_path)
    assert found.models == ()
    assert "m-00002-of-00002.gguf" in found.notes[0]


def test_snapshot_of_hugging_face_is_named_by_its_repository(tmp_path: Path) -> None:
    for revision in ("abc", "def"):
        folder = tmp_path / "models--Qwen--Qwen3-4B" / "snapshots" / revision
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"architectures": ["Qwen3ForCausalLM"]}))
        weights = tmp_path / "weights"
        weights.write_bytes(len(b"{}").to_bytes(8, "little") + b"{}")
        (folder / "model.safetensors").symlink_to(weights)
    assert keys(tmp_path) == ["qwen3-4b"]


def test_usual_folders_follow_the_variables_of_their_programs() -> None:
    env = {"HOME": "/h", "HF_HOME": "/hf", "LLAMA_CACHE": "/lc", "OLLAMA_MODELS": "/om"}
    assert {Path("/hf/hub"), Path("/lc"), Path("/h/.lmstudio/models")} <= set(machine.usual_folders(env))
    assert machine.store_folders(env)[:2] == [Path("/om"), Path("/h/.ollama/models")]


def test_look_reads_the_store_and_the_folders(tmp_path: Path) -> None:
    store = tmp_path / ".ollama" / "models"
    blob = store / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir(parents=True)
    write(blob, layers=1, seed=1, name="x")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}", "size": 1}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    folder = tmp_path / "mine"
    folder.mkdir()
    write(folder / "own.gguf", layers=1, seed=2, name="own")
    found = machine.look([folder], {"HOME": str(tmp_path), "PATH": "/nonexistent"})
    assert [one.stored_as for one in found.stored] == ["tiny:1b"]
    assert [one.name for one in found.files] == ["own"]
    assert found.files[0].needs[0].host > found.files[0].found.size_bytes
    assert found.store == store
    assert any(device.name in ("host", "unified") for device in found.devices)


def test_look_lists_a_file_of_two_folders_once(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    usual = tmp_path / ".cache" / "llama.cpp"
    usual.mkdir(parents=True)
    folder.mkdir()
    write(usual / "own.gguf", layers=1, seed=2, name="own")
    (folder / "alias.gguf").symlink_to(usual / "own.gguf")
    found = machine.look([folder, folder], {"HOME": str(tmp_path), "PATH": "/nonexistent"})
    assert [one.name for one in found.files] == ["alias"], "the folder that was given counts first"
    assert set(found.folders) == {folder, usual}
