"""The real Ollama on the CPU with tiny models of a few hundred KB, to verify what the fake imitates."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.tiny_gguf import write
from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import LaunchContext, ServedModel
from fleetd.engines.ollama.engine import ENGINE
from fleetd.engines.ollama.model_server import OllamaServer
from fleetd.engines.ollama.model_store import OllamaStore
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.errors import EngineError
from fleetd.models.ollama import sync as library_module
from fleetd.models.ollama.modelfile import recipe
from fleetd.models.ollama.sync import Library, StoreChange
from tests.support.engines import Server, launched, ollama_program
from tests.support.ports import free_port

SERVER, STORE = OllamaServer(), OllamaStore()
pytestmark = [pytest.mark.real_engine, pytest.mark.timeout(180)]
TEMPLATE = "{{ .System }} {{ .Prompt }}"
TIMEOUT_S = 60.0


def context(tmp_path: Path, **options: Any) -> LaunchContext:
    store = tmp_path / "store"
    store.mkdir(exist_ok=True)
    return LaunchContext(
        name="ollama-1",
        options=OllamaOptions(models_dir=str(store), **{"num_parallel": 2, **options}),
        host="127.0.0.1",
        port=free_port(),
        command=(ollama_program(), "serve"),
        device="host",
    )


@contextlib.asynccontextmanager
async def served(tmp_path: Path, ready: LaunchContext) -> AsyncIterator[Server]:
    launch = ENGINE.launch(ready)
    assert ready.port is not None
    env = {**launch.env, "HOME": str(tmp_path)}
    async with launched(tmp_path, launch.argv, env, ready.port, "/api/version") as server:
        yield server


def tiny(tmp_path: Path, seed: int = 1) -> Path:
    folder = tmp_path / "my models @f16"
    folder.mkdir(exist_ok=True)
    return write(folder / f"tiny {seed}.gguf", seed=seed)


def names(residents: Any) -> set[str]:
    return {resident.served_as for resident in residents}


def test_model_in_place_is_built_loaded_and_evicted(tmp_path: Path) -> None:
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            path = tiny(tmp_path)
            modelfile = {"template": TEMPLATE, "system": 'say "x"', "parameters": {"num_ctx": 512, "stop": ["</s>"]}}
            one = recipe("a", "tsc-a:f16", source=str(path), modelfile=modelfile)
            two = recipe("b", "b", source=str(path))  # the same file with another name
            for each in (one, two):
                assert (await lib.ensure(each)).change is StoreChange.CREATE
                assert (await lib.ensure(each)).change is StoreChange.NONE
            links = [entry for entry in (tmp_path / "store" / "blobs").iterdir() if entry.is_symlink()]
            assert [link.resolve() for link in links] == [path, path]
            assert (
                sum(
                    entry.stat().st_size for entry in (tmp_path / "store" / "blobs").iterdir() if not entry.is_symlink()
                )
                < 5000
            )
            a, b = ServedModel("a", "tsc-a:f16"), ServedModel("b", "b")
            measured = await SERVER.load(server.http, server.endpoint, a, TIMEOUT_S)
            estimate = ENGINE.estimate(ready, replace(a, source=str(path), modelfile=modelfile))
            assert estimate is not None
            assert 0.5 < estimate.bytes["host"] / measured["host"] < 2
            await SERVER.load(server.http, server.endpoint, b, TIMEOUT_S)
            assert names(await SERVER.loaded(server.http, server.endpoint)) == {"tsc-a:f16", "b"}
            answer = await server.post(
                "/api/chat",
                {
                    "model": "tsc-a:f16",
                    "stream": False,
                    "messages": [{"role": "user", "content": "hi"}],
                    "options": {"num_predict": 3},
                },
            )
            assert answer["done"] is True
            await SERVER.unload(server.http, server.endpoint, b, TIMEOUT_S)
            assert names(await SERVER.loaded(server.http, server.endpoint)) == {"tsc-a:f16"}
            changed = recipe("a", "tsc-a:f16", source=str(tiny(tmp_path, 2)), modelfile=modelfile)
            assert (await lib.ensure(changed)).change is StoreChange.UPDATE
            for step in await lib.plan([]):
                await lib.apply(step)
            assert (await server.get("/api/tags"))["models"] == []
            assert not any(entry.is_symlink() for entry in (tmp_path / "store" / "blobs").iterdir())
            assert path.exists()

    asyncio.run(go())


def test_alive_starts_no_new_runner(tmp_path: Path) -> None:
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            await lib.ensure(recipe("a", "a", source=str(tiny(tmp_path)), modelfile={"template": TEMPLATE}))
            model = ServedModel("a", "a", options={"num_ctx": 768})
            await SERVER.load(server.http, server.endpoint, model, TIMEOUT_S)
            runners = children(server)
            for probed in (model, None, ServedModel("a", "a")):
                outcome = await ENGINE.alive(server.http, server.endpoint, probed, TIMEOUT_S)
                assert outcome.ok
                assert "one token" in outcome.detail
            assert children(server) == runners

    asyncio.run(go())


def test_load_options_survive_requests_without_them(tmp_path: Path) -> None:
    """Test a model built from a file, and one derived from a model that fleetd did not build."""
    ready = context(tmp_path, context_length=512)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            state, path = tmp_path / "state", str(tiny(tmp_path))
            others = Library(server.http, server.endpoint.base_url, tmp_path / "other state", tmp_path / "store")
            await others.ensure(recipe("hand", "hand", source=path, modelfile={"template": TEMPLATE}))
            for source, length in ((path, 2048), ("hand", 1024)):
                template = {"template": TEMPLATE, "parameters": {"temperature": 0.5}}
                model = ServedModel("h", f"h{length}", source=source, modelfile=template, options={"num_ctx": length})
                report = await STORE.build(server.http, server.endpoint, ready, model, state_dir=state)
                assert report == f"h{length}: created, not in the store"
                await SERVER.load(server.http, server.endpoint, model, TIMEOUT_S)
                runners = children(server)
                question = {"model": model.served_as, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
                assert (await server.post("/v1/chat/completions", question))["choices"]
                listed = {one["name"]: one["context_length"] for one in (await server.get("/api/ps"))["models"]}
                assert listed == {f"{model.served_as}:latest": length}
                assert children(server) == runners
                more = replace(model, options={"num_ctx": length + 256})
                report = await STORE.build(server.http, server.endpoint, ready, more, state_dir=state)
                assert report == f"h{length}: updated, its file or its modelfile changed"
                await SERVER.unload(server.http, server.endpoint, model, TIMEOUT_S)
            shown = await server.post("/api/show", {"model": "hand"})
            assert "num_ctx" not in shown.get("parameters", ""), "a model that fleetd did not build is not changed"

    asyncio.run(go())


def children(server: Server) -> set[int]:
    return {child.pid for child in psutil.Process(server.process.pid).children(recursive=True)}


def test_build_quantises_a_model(tmp_path: Path) -> None:
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            path, seen = tiny(tmp_path), []
            one = recipe("q", "q:q8_0", source=str(path), quantize="q8_0")
            await lib.ensure(one, lambda phase, done, total: seen.append((phase, done, total)))
            assert any("quantizing" in phase and 0 < done <= total for phase, done, total in seen)
            assert (await lib.ensure(one)).change is StoreChange.NONE
            shown = await server.post("/api/show", {"model": "q:q8_0"})
            assert shown["details"]["quantization_level"] == "Q8_0"
            assert not any(entry.is_symlink() for entry in (tmp_path / "store" / "blobs").iterdir())
            before = ENGINE.estimate(ready, ServedModel("q", "absent", source=str(path), quantize="q8_0"))
            after = ENGINE.estimate(ready, ServedModel("q", "q:q8_0", source=str(path), quantize="q8_0"))
            assert before is not None
            assert after is not None
            assert abs(before.total_bytes - after.total_bytes) < 30_000  # of 230 KB of weights
            await SERVER.load(server.http, server.endpoint, ServedModel("q", "q:q8_0"), TIMEOUT_S)

    asyncio.run(go())


def test_registered_manifest_equals_that_of_create(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Since 0.30 /api/create copies the file; the manifest that fleetd writes instead must equal Ollama's own."""
    ready = context(tmp_path)
    modelfile = {
        "template": TEMPLATE, "system": "hey", "license": "MIT", "parameters": {"temperature": 0.5, "stop": ["a", "b"]},
        "messages": [{"role": "user", "content": "q"}],
    }  # fmt: skip

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            path = str(tiny(tmp_path))
            await lib.ensure(recipe("a", "made", source=path, modelfile=modelfile))
            monkeypatch.setattr(library_module, "COPIES_SINCE", (0, 0, 0))
            await lib.ensure(recipe("b", "by-hand", source=path, modelfile=modelfile))
            made, by_hand = [await server.post("/api/show", {"model": name}) for name in ("made", "by-hand")]
            for one in (made, by_hand):
                one["parameters"] = sorted(one["parameters"].splitlines())  # in random order
            for key in ("template", "system", "license", "parameters", "messages", "model_info", "capabilities"):
                assert made[key] == by_hand[key], key
            details = [
                {key: value for key, value in one["details"].items() if key != "parent_model"}
                for one in (made, by_hand)
            ]
            assert details[0] == details[1]
            await SERVER.load(server.http, server.endpoint, ServedModel("b", "by-hand"), TIMEOUT_S)
            await lib.delete("by-hand")
            assert Path(path).exists()

    asyncio.run(go())


def test_replicas_of_one_store_build_a_model_once(tmp_path: Path) -> None:
    ready = [context(tmp_path) for _ in range(3)]

    async def go() -> None:
        async with contextlib.AsyncExitStack() as stack:
            servers = [await stack.enter_async_context(served(tmp_path, one)) for one in ready]
            first = servers[0]
            model = ServedModel("a", "a", source=str(tiny(tmp_path)), modelfile={"template": TEMPLATE})
            reports = await asyncio.gather(
                *(
                    STORE.build(one.http, one.endpoint, where, model, state_dir=tmp_path / "state")
                    for one, where in zip(servers, ready, strict=True)
                )
            )
            assert sorted(filter(None, reports)) == ["a: created, not in the store"]  # by one of them
            await asyncio.gather(*(SERVER.load(one.http, one.endpoint, model, TIMEOUT_S) for one in servers))
            assert [names(await SERVER.loaded(one.http, one.endpoint)) for one in servers] == [{"a"}] * 3
            await SERVER.unload(first.http, first.endpoint, model, TIMEOUT_S)
            assert [len(await SERVER.loaded(one.http, one.endpoint)) for one in servers] == [0, 1, 1]

    asyncio.run(go())


def test_kill_of_server_leaves_runners_in_the_group(tmp_path: Path) -> None:
    """Show why the host sweeps the whole set: the runner of a dead server keeps its memory."""
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            await lib.ensure(recipe("a", "a", source=str(tiny(tmp_path)), modelfile={"template": TEMPLATE}))
            await SERVER.load(server.http, server.endpoint, ServedModel("a", "a"), TIMEOUT_S)
            runners = children(server)
            assert runners
            server.process.kill()
            server.process.wait()
            left = {
                pid
                for pid in runners
                if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
            }
            assert left
            assert {os.getpgid(pid) for pid in left} == {server.process.pid}
            with contextlib.suppress(ProcessLookupError):
                os.killpg(server.process.pid, signal.SIGKILL)

    asyncio.run(go())


def test_used_port_is_classified(tmp_path: Path) -> None:
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready):
            launch = ENGINE.launch(ready)
            env = {**os.environ, **launch.env, "HOME": str(tmp_path)}
            second = await asyncio.create_subprocess_exec(*launch.argv, env=env, stderr=asyncio.subprocess.PIPE)
            _, output = await asyncio.wait_for(second.communicate(), TIMEOUT_S)
            verdict = ENGINE.classify_exit(second.returncode, None, output.decode().splitlines())
            assert (second.returncode, verdict.kind) == (1, ExitKind.PORT_IN_USE)

    asyncio.run(go())


def test_load_missing_model_or_file_is_an_error(tmp_path: Path) -> None:
    ready = context(tmp_path)

    async def go() -> None:
        async with served(tmp_path, ready) as server:
            with pytest.raises(EngineError, match="has no model nope") as caught:
                await SERVER.load(server.http, server.endpoint, ServedModel("n", "nope"), TIMEOUT_S)
            assert not caught.value.recoverable
            lib = Library(server.http, server.endpoint.base_url, tmp_path / "state", tmp_path / "store")
            path = tiny(tmp_path)
            await lib.ensure(recipe("a", "a", source=str(path), modelfile={"template": TEMPLATE}))
            path.rename(path.with_name("elsewhere.gguf"))
            with pytest.raises(EngineError):
                await SERVER.load(server.http, server.endpoint, ServedModel("a", "a"), TIMEOUT_S)

    asyncio.run(go())
