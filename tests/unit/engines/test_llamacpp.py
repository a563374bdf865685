"""The engine `llamacpp`: its command line, its checks, and the embedded server with a tiny model."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from bench import tiny_gguf
from fleetd.core.data.specs import ExitKind
from fleetd.engines import registry
from fleetd.engines.base import Endpoint, LaunchContext
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.engines.llamacpp import command, server_main
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.errors import EngineError
from tests.fakes.launch import fake
from tests.support.ports import free_port
from tests.support.waiting import until

ENGINE = registry.load("llamacpp")
needs_wheel = pytest.mark.skipif(importlib.util.find_spec("xllamacpp") is None, reason="xllamacpp is not installed")


def context(model: Path | str = "/models/m.gguf", **more: Any) -> LaunchContext:
    names = {"command", "env", "args", "device", "port", "served_as", "config_dir", "device_uuid"}
    rest = {key: more.pop(key) for key in list(more) if key in names}
    options = LlamaCppOptions(model=str(model), **more)
    base = LaunchContext(name="tiny", options=options, host="127.0.0.1", port=18080, served_as="tiny", device="host")
    return replace(base, **rest)


def flags_of(**more: Any) -> dict[str, str]:
    """Return the flags after the program, each with its value."""
    argv = ENGINE.launch(context(command=("/opt/llama-server",), **more)).argv[1:]
    return {word: after for word, after in zip(argv, [*argv[1:], ""], strict=True) if word.startswith("--")}


# -- the command line ---------------------------------------------------------------------------------------------------

FLAGS: list[tuple[dict[str, Any], dict[str, str | None]]] = [
    ({}, {"--model": "/models/m.gguf", "--port": "18080", "--host": "127.0.0.1", "--alias": "tiny", "--ctx-size": "4096"}),
    ({}, {"--gpu-layers": "0", "--cache-ram": "0", "--flash-attn": None, "--cache-type-k": None, "--embeddings": None}),
    ({"context_length": 2048, "parallel": 4}, {"--ctx-size": "8192", "--parallel": "4"}),
    ({"served_as": "org/name:q8"}, {"--alias": "org/name:q8"}),
    ({"gpu_layers": 12, "device": "gpu0"}, {"--gpu-layers": "12"}),
    ({"device": "gpu0"}, {"--gpu-layers": None}),
    ({"flash_attention": True}, {"--flash-attn": "on"}),
    ({"flash_attention": False}, {"--flash-attn": "off"}),
    ({"cache_type_k": "q8_0", "cache_type_v": "q4_0"}, {"--cache-type-k": "q8_0", "--cache-type-v": "q4_0"}),
    ({"load_mode": "read"}, {"--load-mode": "none"}),
    ({"mmap": False}, {"--load-mode": "none"}),
    ({"mmap": False, "mlock": True}, {"--load-mode": "mlock"}),
    ({"mlock": True}, {"--load-mode": "mmap+mlock"}),
    ({"load_mode": "direct"}, {"--load-mode": "dio"}),
    ({"cache_ram": "64MiB"}, {"--cache-ram": "64"}),
    ({"lora": ["/a.gguf"]}, {"--lora-scaled": "/a.gguf:1"}),
    ({"lora": [{"path": "/a.gguf", "scale": 0.5}]}, {"--lora-scaled": "/a.gguf:0.5"}),
    ({"embeddings": True, "pooling": "mean"}, {"--embeddings": "--metrics", "--pooling": "mean"}),
    ({"rerank": True, "embeddings": True}, {"--rerank": "--metrics", "--embeddings": None}),
    ({"jinja": False}, {"--no-jinja": "--metrics", "--jinja": None}),
    ({"tensor_split": [3, 1], "main_gpu": 1, "split_mode": "row", "device": "gpu0"}, {"--tensor-split": "3,1", "--main-gpu": "1"}),
    ({"threads": 2, "threads_batch": 3, "seed": 7}, {"--threads": "2", "--threads-batch": "3", "--seed": "7"}),
    ({"model": "sub/m.gguf", "config_dir": Path("/etc/fleet")}, {"--model": "/etc/fleet/sub/m.gguf"}),
    ({"mmproj": "p.gguf", "config_dir": Path("/etc/fleet")}, {"--mmproj": "/etc/fleet/p.gguf"}),
]  # fmt: skip


@pytest.mark.parametrize(("options", "wanted"), FLAGS)
def test_launch_options_become_flags(options: dict[str, Any], wanted: dict[str, str | None]) -> None:
    found = flags_of(**options)
    assert {flag: found.get(flag) for flag in wanted} == wanted


@pytest.mark.parametrize(("options", "wanted"), FLAGS)
def test_server_main_accepts_every_launch_flag(options: dict[str, Any], wanted: object) -> None:
    argv = ENGINE.launch(context(command=("x",), **options)).argv[1:]
    assert server_main.parse(argv)


def test_launch_uses_llama_server_else_the_wheel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = tmp_path / "llama-server"
    server.write_text("#!/bin/sh\n")
    server.chmod(0o755)
    assert ENGINE.launch(context(env={"PATH": str(tmp_path)})).argv[0] == str(server)
    monkeypatch.setattr(command, "_EMBEDDED", {})  # results are cached for a second
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert ENGINE.launch(context(env={"PATH": "/nowhere"})).argv[:3] == (
        sys.executable,
        "-I",
        str(command.EMBEDDED_SERVER),
    )
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    command._EMBEDDED.clear()
    with pytest.raises(EngineError) as caught:
        ENGINE.launch(context(env={"PATH": "/nowhere"}))
    assert caught.value.hint == "pip install 'fleetd[llamacpp]'"
    assert not caught.value.recoverable


def test_launch_requires_every_file() -> None:
    launch = ENGINE.launch(
        context(
            "/m/big-00001-of-00003.gguf",
            mmproj="/m/p.gguf",
            lora=["/m/l.gguf"],
            chat_template_file="/m/t",
            command=("x",),
        )
    )
    parts = [f"/m/big-0000{part}-of-00003.gguf" for part in (1, 2, 3)]
    assert launch.requires == (*parts, "/m/p.gguf", "/m/l.gguf", "/m/t")


def test_launch_passes_the_key_in_the_environment() -> None:
    launch = ENGINE.launch(context(api_key="sekrit", command=("x",)))
    assert launch.env["LLAMA_API_KEY"] == "sekrit"
    assert launch.secret_env == {"LLAMA_API_KEY"}
    assert "LLAMA_API_KEY" in ENGINE.launch(context(command=("x",))).unset_env


# -- validate -----------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[dict[str, Any], tuple[str, ...], str]] = [
    ({"chat_template": "a", "chat_template_file": "b"}, ("chat_template_file",), "one of the two"),
    ({"mmap": True, "load_mode": "read"}, ("mmap",), "conflicts with load_mode"),
    ({"mlock": True, "load_mode": "direct"}, ("mlock",), "not possible"),
    ({"flash_attention": False, "cache_type_v": "q8_0"}, ("cache_type_v",), "needs flash attention"),
    ({"rerank": True, "pooling": "mean"}, ("pooling",), "rank"),
    ({"batch": 64, "ubatch": 128}, ("ubatch",), "more than batch"),
    ({"tensor_split": [0, 0], "device": "gpu0"}, ("tensor_split",), "add up to 0"),
    ({"env": {"LLAMA_ARG_CTX_SIZE": "1"}, "context_length": 5}, ("env", "LLAMA_ARG_CTX_SIZE"), "context_length"),
    ({"env": {"LLAMA_ARG_PORT": "1"}}, ("env", "LLAMA_ARG_PORT"), "itself"),
    ({"env": {"LLAMA_API_KEY": "1"}}, ("env", "LLAMA_API_KEY"), "api_key"),
    ({"extra_args": ["--port", "1"]}, ("extra_args",), "itself"),
    ({"args": ("-c", "1")}, ("args",), "context_length"),
    ({"extra_args": ["--n-gpu-layers=3"]}, ("extra_args",), "gpu_layers"),
    ({"model": "/m/x-00002-of-00003.gguf"}, ("model",), "x-00001-of-00003.gguf"),
    ({"model": "/"}, ("model",), "folder"),
]


@pytest.mark.parametrize(("options", "path", "text"), MISTAKES)
def test_validate_reports_mistake_at_its_option(options: dict[str, Any], path: tuple[str, ...], text: str) -> None:
    found = [problem for problem in ENGINE.validate(context(**{"command": ("x",), **options})) if not problem.warning]
    assert [(problem.path, text in problem.message) for problem in found] == [(path, True)]


def test_validate_unknown_flag_fails_for_embedded_server_only() -> None:
    entry = context(extra_args=["--rpc", "host:1", "--temp", "-1"], env={"PATH": "/nowhere"})
    (problem,) = ENGINE.validate(entry)
    assert "--rpc" in problem.message
    assert not ENGINE.validate(replace(entry, command=("/opt/llama-server",)))


def test_validate_gpu_option_without_a_gpu_is_a_warning() -> None:
    """The same file loads on a machine with a GPU."""
    (found,) = ENGINE.validate(context(command=("x",), gpu_layers=3))
    assert (found.path, found.warning, "device: host" in found.message) == (("gpu_layers",), True, True)


def test_validate_broken_file_is_a_warning(tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf", context=512)
    (problem,) = ENGINE.validate(context(path, context_length=512, cache_type_k="q8_0"))
    assert problem.path == ("cache_type_k",)
    assert "16" in problem.message
    (warned,) = ENGINE.validate(context(path, context_length=1024))
    assert warned.warning
    assert "trained for (512)" in warned.message
    os.truncate(path, 5000)
    (warned,) = ENGINE.validate(context(path, context_length=512))
    assert warned.warning  # a warning, so that the other models of the fleet start
    assert warned.path == ("model",)


@pytest.mark.parametrize(
    "bad",
    [{}, {"model": ""}, {"model": "x", "parallel": 0}, {"model": "x", "gpu_layers": "all"}, {"model": "x", "ctx": 1},
     {"model": "x", "cache_type_k": "q3"}, {"model": "x", "cache_ram": "10G"}, {"model": "x", "lora": [{"scale": 1}]}],
)  # fmt: skip
def test_options_wrong_type_is_rejected(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="LlamaCppOptions"):
        LlamaCppOptions(**bad)


EXITS = [
    (1, None, "E srv  start: couldn't bind HTTP server socket, hostname: 127.0.0.1, port: 1", ExitKind.PORT_IN_USE),
    (1, None, "ggml_backend_cuda_buffer_type_alloc_buffer: cudaMalloc failed: out of memory", ExitKind.OOM),
    (1, None, "llama_model_load: error loading model: unable to allocate CUDA0 buffer", ExitKind.OOM),
    (None, "SIGABRT", "ggml_cuda_error: out of memory", ExitKind.OOM),
    (1, None, "error: invalid argument: --nope", ExitKind.BAD_CONFIG),
    (2, None, "error: unknown argument: --nope", ExitKind.BAD_CONFIG),
    (
        2,
        None,
        "error: the xllamacpp wheel cannot be imported: libgomp.so.1: cannot open shared object file: No such file or directory",
        ExitKind.BAD_CONFIG,
    ),
    (1, None, "llama_model_load: error loading model: unknown model architecture: 'x'", ExitKind.BAD_CONFIG),
    (1, None, "srv    load_model: failed to load model, '/m.gguf'", ExitKind.BAD_CONFIG),
    (1, None, "error: failed to load model '/m.gguf': No such file or directory", ExitKind.CRASH),
    (1, None, "something else", ExitKind.CRASH),
    (None, "SIGSEGV", "something else", ExitKind.CRASH),
    (None, "SIGTERM", "failed to load model", ExitKind.CRASH),
    (0, None, "failed to load model", ExitKind.EXPECTED),
    (None, None, "", ExitKind.UNKNOWN),
]


@pytest.mark.parametrize(("code", "number", "line", "kind"), EXITS)
def test_classify_exit_reads_the_log(code: int | None, number: str | None, line: str, kind: ExitKind) -> None:
    assert ENGINE.classify_exit(code, number, ["I srv init: loading", line, "I srv cleaning up"]).kind is kind


def test_alive_busy_server_is_ok() -> None:
    async def run(base: str) -> Any:
        async with aiohttp.ClientSession() as client:
            slow = asyncio.create_task(client.post(base + "/v1/chat/completions", json={"messages": []}))
            await asyncio.to_thread(until, lambda: server.stats()["in_flight"], "the slot is taken")
            begun = time.monotonic()
            outcome = await ENGINE.alive(client, Endpoint(base), None, 5)
            slow.cancel()
            await asyncio.gather(slow, return_exceptions=True)
            return outcome, time.monotonic() - begun

    with fake("--api", "llamacpp", "--slots", "1", "--tps", "2", "--tokens", "100") as server:
        outcome, took_s = asyncio.run(run(server.base_url))
    assert outcome.ok
    assert "busy" in outcome.detail
    assert took_s < 3


def test_alive_hanging_server_fails() -> None:
    async def run(base: str) -> Any:
        async with aiohttp.ClientSession() as client:
            return await ENGINE.alive(client, Endpoint(base), None, 0.5)

    with fake("--api", "llamacpp", "--hang-after", "0") as server:
        assert not asyncio.run(run(server.base_url)).ok


# -- the real engine ----------------------------------------------------------------------------------------------------


@dataclass
class Real:
    process: subprocess.Popen[bytes]
    port: int
    log: Path

    def request(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, None if body is None else json.dumps(body), dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read()
        finally:
            connection.close()

    def healthy(self) -> bool:
        assert self.process.poll() is None, self.log.read_text("utf-8", "replace")
        try:
            return self.request("GET", "/health")[0] == 200
        except OSError:
            return False

    def verdict(self) -> Any:
        code = self.process.wait(30)
        lines = self.log.read_text("utf-8", "replace").splitlines()
        return ENGINE.classify_exit(
            code if code >= 0 else None, signal.Signals(-code).name if code < 0 else None, lines[-40:]
        )


@contextlib.contextmanager
def real(folder: Path, entry: LaunchContext, *, wait: bool = True) -> Iterator[Real]:
    """Run the engine's launch on the embedded server, even if a llama-server is installed."""
    entry = replace(entry, port=free_port(), env={"PATH": "/nowhere"})
    launch = ENGINE.launch(entry)
    log = folder / "server.log"
    with (
        log.open("wb") as output,
        subprocess.Popen(
            launch.argv, env={**os.environ, **launch.env}, stdin=subprocess.DEVNULL, stdout=output, stderr=output
        ) as process,
    ):
        server = Real(process, entry.port or 0, log)
        try:
            if wait:
                until(server.healthy, "it is ready")
            yield server
        finally:
            process.kill()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_gguf.write(tmp_path_factory.mktemp("models") / "tiny.gguf", embedding=128)


def alive(server: Real, key: str | None = None) -> Any:
    async def run() -> Any:
        async with aiohttp.ClientSession() as client:
            return await ENGINE.alive(client, Endpoint(f"http://127.0.0.1:{server.port}", key), None, 10)

    return asyncio.run(run())


def residents(server: Real) -> list[str]:
    async def run() -> Any:
        async with aiohttp.ClientSession() as client:
            return await LISTED_MODELS.loaded(client, Endpoint(f"http://127.0.0.1:{server.port}"))

    return [resident.served_as for resident in asyncio.run(run())]


@needs_wheel
def test_server_main_serves_under_the_fleet_name(tiny: Path, tmp_path: Path) -> None:
    with real(tmp_path, context(tiny, served_as="org/tiny:1", context_length=1024, parallel=3, threads=1)) as server:
        chat = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 5}
        status, body = server.request("POST", "/v1/chat/completions", chat)
        answer = json.loads(body)
        assert status == 200
        assert answer["model"] == "org/tiny:1"
        assert answer["usage"]["completion_tokens"] >= 1
        stream = server.request("POST", "/v1/chat/completions", {**chat, "stream": True})[1]
        assert stream.rstrip().endswith(b"data: [DONE]")
        listing = json.loads(server.request("GET", "/v1/models")[1])["data"]
        assert [entry["id"] for entry in listing] == ["org/tiny:1"]
        assert listing[0]["meta"]["n_ctx"] == 1024  # what one request gets
        assert len(json.loads(server.request("GET", "/slots")[1])) == 3
        assert b"llamacpp:" in server.request("GET", "/metrics")[1]
        outcome = alive(server)
        assert outcome.ok, outcome.detail
        assert residents(server) == ["org/tiny:1"]
        server.process.terminate()
        assert server.process.wait(10) == 0


@needs_wheel
@pytest.mark.parametrize("options", [{"embeddings": True, "pooling": "mean"}, {"embeddings": True}, {"rerank": True}])
def test_alive_embedding_server_is_ok(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with real(tmp_path, context(tiny, context_length=512, threads=1, **options)) as server:
        assert alive(server).ok
        if options.get("pooling"):
            status, body = server.request("POST", "/v1/embeddings", {"input": "hello"})
            assert status == 200
            assert len(json.loads(body)["data"][0]["embedding"]) == 128


@needs_wheel
def test_server_main_requires_its_key(tiny: Path, tmp_path: Path) -> None:
    with real(tmp_path, context(tiny, context_length=512, threads=1, api_key="sekrit")) as server:
        completion = {"prompt": "a", "max_tokens": 1}
        assert server.request("POST", "/v1/completions", completion)[0] == 401
        assert server.request("POST", "/v1/completions", completion, {"Authorization": "Bearer sekrit"})[0] == 200
        assert not alive(server).ok
        assert alive(server, "sekrit").ok
        assert (
            "sekrit" not in Path(f"/proc/{server.process.pid}/cmdline").read_text()
            if Path("/proc/self").exists()
            else True
        )


@needs_wheel
@pytest.mark.parametrize(
    "options",
    [{"cache_type_k": "q8_0", "cache_type_v": "q8_0", "flash_attention": True}, {"load_mode": "read"}, {"mlock": True},
     {"batch": 64, "ubatch": 32, "seed": 3}, {"chat_template": "{{ messages[0]['content'] }}", "jinja": True},
     {"cache_ram": "8MiB", "extra_args": ("--temp", "0", "--no-warmup")}],
)  # fmt: skip
def test_server_main_applies_the_options(tiny: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    with real(tmp_path, context(tiny, context_length=512, threads=1, **options)) as server:
        status, _ = server.request(
            "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
        )
        assert status == 200


@needs_wheel
@pytest.mark.parametrize(
    ("data", "kind", "text"),
    [(b"<html>", ExitKind.BAD_CONFIG, "not a GGUF file"), (b"GGUF\x03\0\0\0", ExitKind.BAD_CONFIG, "load"),
     (None, ExitKind.CRASH, "No such file")],
)  # fmt: skip
def test_server_main_bad_model_exits_with_reason(tmp_path: Path, data: bytes | None, kind: ExitKind, text: str) -> None:
    path = tmp_path / "bad.gguf"
    if data is not None:
        path.write_bytes(data)
    with real(tmp_path, context(path), wait=False) as server:
        verdict = server.verdict()
        assert verdict.kind is kind
        assert text in verdict.reason
        assert "Traceback" not in server.log.read_text()


@needs_wheel
def test_server_main_used_port_is_classified(tiny: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        launch = ENGINE.launch(context(tiny, port=taken.getsockname()[1], env={"PATH": "/nowhere"}))
        done = subprocess.run(launch.argv, capture_output=True, text=True, timeout=30, check=False)
    lines = (done.stdout + done.stderr).splitlines()
    assert ENGINE.classify_exit(done.returncode, None, lines).kind is ExitKind.PORT_IN_USE


@needs_wheel
def test_server_main_sigterm_stops_it_during_a_load(tmp_path: Path) -> None:
    """Loading holds the interpreter: a Python handler would run only after it."""
    model = tiny_gguf.write(tmp_path / "big.gguf", tiny_gguf.sized(200))
    with real(tmp_path, context(model, load_mode="read", threads=1), wait=False) as server:
        until(lambda: "loading model" in server.log.read_text("utf-8", "replace"), "it loads")
        begun = time.monotonic()
        server.process.terminate()
        assert server.process.wait(10) in (0, -signal.SIGTERM)
        assert time.monotonic() - begun < 1


@needs_wheel
def test_server_main_answers_soon_after_its_start(tiny: Path, tmp_path: Path) -> None:
    """Some 45 ms on an idle machine, and 2 ms to stop; the limits allow for a busy one."""
    answered, stopped = [], []
    for _ in range(5):
        begun = time.perf_counter()
        with real(tmp_path, context(tiny, threads=1), wait=False) as server:
            while not server.healthy():
                time.sleep(0.002)
            server.request(
                "POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
            )
            answered.append(time.perf_counter() - begun)
            asked = time.perf_counter()
            server.process.terminate()
            server.process.wait(10)
            stopped.append(time.perf_counter() - asked)
    assert min(answered) < 3
    assert statistics.median(stopped) < 0.5


@needs_wheel
def test_server_main_imports_nothing_heavy() -> None:
    program = (
        f"import sys; sys.path.insert(0, {str(command.EMBEDDED_SERVER.parent)!r}); import server_main as child; child.load_library();"
        "print(sorted(name for name in ('inspect', 'orjson', 'asyncio', 'argparse', 'logging', 'fleetd') if name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[]"


@pytest.mark.skipif(shutil.which("llama-server") is None, reason="llama-server is not installed")
def test_llama_server_accepts_the_same_command_line(tiny: Path, tmp_path: Path) -> None:
    program = str(shutil.which("llama-server"))
    with real(tmp_path, context(tiny, command=(program,), context_length=512, threads=1)) as server:
        assert alive(server).ok
