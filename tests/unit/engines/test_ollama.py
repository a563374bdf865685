"""The engine `ollama`: its environment as tables, its API against the fake server."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench import tiny_gguf
from fleetd.core.data.specs import ExitKind, ExitReport, describe_exit
from fleetd.engines.base import LaunchContext, ServedModel
from fleetd.engines.ollama.engine import ENGINE
from fleetd.engines.ollama.environment import TYPED
from fleetd.engines.ollama.model_server import OllamaServer, device_bytes, pinned_options
from fleetd.engines.ollama.model_store import OllamaStore
from fleetd.engines.ollama.options import OllamaOptions
from fleetd.engines.ollama.validate import GO_BOOLEANS
from fleetd.errors import EngineError
from fleetd.models.memory_estimate import PROCESS_BYTES
from fleetd.models.ollama import register, store
from fleetd.models.ollama.modelfile import recipe
from tests.support.engines import fake

GIB = 1 << 30
SERVER, STORE = OllamaServer(), OllamaStore()


def context(**changes: Any) -> LaunchContext:
    options = changes.pop("options", {})
    values = {"name": "ollama-1", "host": "127.0.0.1", "port": 11434, "command": ("ollama", "serve"), **changes}
    return LaunchContext(options=OllamaOptions(**options), **values)


def rendered(**options: Any) -> Mapping[str, str]:
    return ENGINE.launch(context(options=options)).env


# -- the environment ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "value", "variable", "text"),
    [
        ("keep_alive", -1, "OLLAMA_KEEP_ALIVE", "-1"),
        ("keep_alive", "forever", "OLLAMA_KEEP_ALIVE", "-1"),
        ("keep_alive", "5m", "OLLAMA_KEEP_ALIVE", "300000ms"),
        ("keep_alive", 0, "OLLAMA_KEEP_ALIVE", "0ms"),
        ("load_timeout", "1d", "OLLAMA_LOAD_TIMEOUT", "86400000ms"),
        ("context_length", 8192, "OLLAMA_CONTEXT_LENGTH", "8192"),
        ("num_parallel", 4, "OLLAMA_NUM_PARALLEL", "4"),
        ("max_loaded_models", 3, "OLLAMA_MAX_LOADED_MODELS", "3"),
        ("max_queue", 16, "OLLAMA_MAX_QUEUE", "16"),
        ("kv_cache_type", "q8_0", "OLLAMA_KV_CACHE_TYPE", "q8_0"),
        ("flash_attention", True, "OLLAMA_FLASH_ATTENTION", "true"),
        ("flash_attention", False, "OLLAMA_FLASH_ATTENTION", "false"),
        ("sched_spread", True, "OLLAMA_SCHED_SPREAD", "true"),
        ("gpu_overhead", "1GiB", "OLLAMA_GPU_OVERHEAD", str(GIB)),
        ("igpu", True, "OLLAMA_IGPU_ENABLE", "true"),
        ("vulkan", False, "OLLAMA_VULKAN", "false"),
        ("llm_library", "cuda_v13", "OLLAMA_LLM_LIBRARY", "cuda_v13"),
        ("origins", ["https://a", "https://b"], "OLLAMA_ORIGINS", "https://a,https://b"),
        ("noprune", False, "OLLAMA_NOPRUNE", "false"),
        ("no_cloud", False, "OLLAMA_NO_CLOUD", "false"),
        ("remotes", ["ollama.com"], "OLLAMA_REMOTES", "ollama.com"),
        ("go_template", True, "OLLAMA_GO_TEMPLATE", "true"),
        ("debug", 2, "OLLAMA_DEBUG", "2"),
        ("debug", True, "OLLAMA_DEBUG", "true"),
        ("debug_log_requests", True, "OLLAMA_DEBUG_LOG_REQUESTS", "true"),
        ("max_transfer_streams", 2, "OLLAMA_MAX_TRANSFER_STREAMS", "2"),
        ("cache_ram", "512MiB", "LLAMA_ARG_CACHE_RAM", "512"),
        ("fit", False, "LLAMA_ARG_FIT", "off"),
        ("fit_target", "1GiB", "LLAMA_ARG_FIT_TARGET", "1024"),
        ("n_gpu_layers", 0, "LLAMA_ARG_N_GPU_LAYERS", "0"),
        ("n_cpu_moe", 4, "LLAMA_ARG_N_CPU_MOE", "4"),
        ("ctx_checkpoints", 0, "LLAMA_ARG_CTX_CHECKPOINTS", "0"),
        ("hsa_override_gfx_version", "11.0.0", "HSA_OVERRIDE_GFX_VERSION", "11.0.0"),
    ],
)
def test_launch_option_becomes_its_variable(option: str, value: Any, variable: str, text: str) -> None:
    assert rendered(**{option: value})[variable] == text


def test_every_option_has_a_variable() -> None:
    assert set(OllamaOptions.model_fields) == {*TYPED, "api_key"}


def test_launch_defaults_leave_decisions_to_fleetd() -> None:
    env = rendered()
    assert {
        "OLLAMA_KEEP_ALIVE": "-1",
        "OLLAMA_NOPRUNE": "true",
        "OLLAMA_NO_CLOUD": "true",
        "OLLAMA_CONTEXT_LENGTH": "4096",
        "OLLAMA_NUM_PARALLEL": "1",
        "OLLAMA_MAX_LOADED_MODELS": "8",
        "OLLAMA_HOST": "127.0.0.1:11434",
        "LLAMA_ARG_CACHE_RAM": "0",
    }.items() <= env.items()
    assert "OLLAMA_KV_CACHE_TYPE" not in env
    assert "OLLAMA_MODELS" not in env


def test_validate_api_key_needs_external() -> None:
    keyed = context(options={"api_key": "k"})
    (problem,) = ENGINE.validate(keyed)
    assert problem.path == ("api_key",)
    assert not ENGINE.validate(replace(keyed, external=True))


def test_launch_max_loaded_models_covers_the_fleet() -> None:
    models = tuple(ServedModel(f"m{number}", f"m{number}") for number in range(12))
    assert ENGINE.launch(context(models=models)).env["OLLAMA_MAX_LOADED_MODELS"] == "12"


@given(st.floats(min_value=0, max_value=3e8, allow_nan=False))
def test_launch_duration_is_in_whole_milliseconds(seconds: float) -> None:
    env = ENGINE.launch(
        LaunchContext("o", OllamaOptions.model_construct(keep_alive=seconds), "::1", 1, command=("ollama",))
    ).env
    text = env["OLLAMA_KEEP_ALIVE"]
    assert text.endswith("ms")
    assert abs(int(text[:-2]) / 1000 - seconds) <= 0.001


@pytest.mark.parametrize(
    ("host", "port", "text"),
    [("127.0.0.1", 11434, "127.0.0.1:11434"), ("::1", 1234, "[::1]:1234"), ("localhost", 80, "localhost:80")],
)
def test_launch_host_is_the_address(host: str, port: int, text: str) -> None:
    assert ENGINE.launch(context(host=host, port=port)).env["OLLAMA_HOST"] == text


@pytest.mark.parametrize(
    ("uuid", "device", "expected"),
    [
        (
            "GPU-2f9b3c6a-1111-2222-3333-444455556666",
            "gpu0",
            {"CUDA_VISIBLE_DEVICES": "GPU-2f9b3c6a-1111-2222-3333-444455556666"},
        ),
        ("GPU-0123456789abcdef", "gpu0", {"ROCR_VISIBLE_DEVICES": "GPU-0123456789abcdef"}),
        (None, "host", {"CUDA_VISIBLE_DEVICES": "-1", "ROCR_VISIBLE_DEVICES": "-1", "GGML_VK_VISIBLE_DEVICES": "-1"}),
        (None, "unified", {}),
    ],
)
def test_launch_shows_only_its_own_device(uuid: str | None, device: str, expected: Mapping[str, str]) -> None:
    env = ENGINE.launch(context(device_uuid=uuid, device=device)).env
    seen = {key: env[key] for key in env if key.endswith("VISIBLE_DEVICES")}
    assert seen == expected


def test_launch_unsets_inherited_variables() -> None:
    launch = ENGINE.launch(context(env={"OLLAMA_DEBUG": "1"}))
    assert "LLAMA_API_KEY" in launch.unset_env
    assert "OLLAMA_KV_CACHE_TYPE" in launch.unset_env
    assert not set(launch.unset_env) & {*launch.env, "OLLAMA_DEBUG", "OLLAMA_MODELS"}


def test_launch_requires_models_dir(tmp_path: Path) -> None:
    launch = ENGINE.launch(context(options={"models_dir": "models"}, config_dir=tmp_path))
    assert launch.requires == (str(tmp_path / "models"),)
    assert launch.env["OLLAMA_MODELS"] == str(tmp_path / "models")
    assert ENGINE.launch(context(env={"OLLAMA_MODELS": "/Volumes/X"})).requires == ("/Volumes/X",)


def test_recipe_contains_the_load_options() -> None:
    """Requests to /v1 carry no load options, so the model contains them; a changed option rebuilds the model."""
    modelfile = {"system": "Hi.", "parameters": {"top_k": 3}}
    keys = ServedModel("m", "m", source="/m.gguf", modelfile=modelfile, options={"num_ctx": "2048", "use_mmap": False})
    made = STORE.recipe(context(), keys)
    assert made.parameters == {"top_k": 3, "num_ctx": 2048, "use_mmap": False}
    assert "PARAMETER num_ctx 2048" in made.render()
    changed = STORE.recipe(context(), replace(keys, options={"num_ctx": 4096, "use_mmap": False}))
    assert changed.content_hash({}) != made.content_hash({})


def test_estimate_derived_model_uses_its_base(tmp_path: Path) -> None:
    path, digest = tiny_gguf.write(tmp_path / "m.gguf"), "sha256:" + "a" * 64
    blob = store.blob_path(tmp_path, digest)
    blob.parent.mkdir()
    blob.symlink_to(path)
    register.register(tmp_path, recipe("base", "base", source=str(path)), digest)
    ready = context(options={"models_dir": str(tmp_path)}, device="host")
    derived = ServedModel("m", "base-own", source="base", options={"num_ctx": 512})
    found = ENGINE.estimate(ready, derived)
    assert found is not None
    assert found == ENGINE.estimate(ready, replace(derived, source=str(path)))
    assert ENGINE.estimate(ready, replace(derived, source="absent")) is None
    assert ENGINE.estimate(ready, replace(derived, source="~nouser/m.gguf")) is None


def test_launch_finds_ollama_or_fails_with_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetd.engines.ollama.engine.PLACES", ())
    with pytest.raises(EngineError, match="no program named ollama") as caught:
        ENGINE.launch(context(command=(), env={"PATH": str(tmp_path)}))
    assert not caught.value.recoverable
    assert caught.value.hint
    program = tmp_path / "ollama"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    assert ENGINE.launch(context(command=(), env={"PATH": str(tmp_path)})).argv == (str(program), "serve")


@pytest.mark.parametrize(
    "options",
    [
        {"kv_cache_type": "q8"},
        {"num_parallel": 0},
        {"context_length": "many"},
        {"keep_alive": "5"},
        {"keep_alive": -5},
        {"load_timeout": 300},
        {"gpu_overhead": "10G"},
        {"flash_attention": "maybe"},
        {"debug": 3},
        {"unknown": 1},
        {"hsa_override_gfx_version": "gfx1100"},
    ],
)
def test_options_wrong_value_is_rejected(options: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError):
        OllamaOptions(**options)


@pytest.mark.parametrize(
    ("changes", "path", "text", "warning"),
    [
        ({"env": {"OLLAMA_KEEP_ALIVE": "5m"}}, ("env", "OLLAMA_KEEP_ALIVE"), "options.keep_alive sets it", False),
        ({"env": {"OLLAMA_HOST": "0.0.0.0"}}, ("env", "OLLAMA_HOST"), "port sets it", False),
        ({"env": {"OLLAMA_FLASH_ATTENTION": "off"}}, ("env", "OLLAMA_FLASH_ATTENTION"), "take it as true", False),
        ({"env": {"OLLAMA_MAX_QUEUE": "lots"}}, ("env", "OLLAMA_MAX_QUEUE"), "not a whole number", False),
        ({"env": {"OLLAMA_LOAD_TIMEOUT": "1d"}}, ("env", "OLLAMA_LOAD_TIMEOUT"), "not a duration", False),
        ({"env": {"LLAMA_API_KEY": "x"}}, ("env", "LLAMA_API_KEY"), "every load would fail", False),
        ({"env": {"OLLAMA_MAX_VRAM": "1"}}, ("env", "OLLAMA_MAX_VRAM"), "no effect", True),
        ({"env": {"OLLAMA_ORIGIN": "x"}}, ("env", "OLLAMA_ORIGIN"), "did you mean OLLAMA_ORIGINS", True),
        ({"args": ("--verbose",)}, ("args",), "no arguments", False),
        ({"options": {"gpu_overhead": 1}}, ("gpu_overhead",), "no effect", True),
        ({"options": {"keep_alive": "5m"}}, ("keep_alive",), "ttl", True),
        ({"options": {"llm_library": "cpu"}}, ("llm_library",), "without a GPU", True),
        ({"env": {"OLLAMA_MODELS": "/nowhere/at/all"}}, (), "does not exist", True),
        ({"options": {"kv_cache_type": "q8_0", "flash_attention": False}}, ("kv_cache_type",), "needs flash", False),
        ({"options": {"kv_cache_type": "q8_0"}}, ("kv_cache_type",), "flash_attention: true", True),
        ({"port": 40000}, (), "at random", True),
        ({"host": "0.0.0.0"}, (), "requires no key", True),
        ({"models": (ServedModel("m", "a@b"),)}, ("models", "m", "served_as"), "'a@b'", False),
        ({"models": (ServedModel("m", "a:cloud"),)}, ("models", "m", "served_as"), "reserves the ending", False),
        (
            {"models": (ServedModel("m", "a", options={"temperature": 1}),)},
            ("models", "m", "options", "temperature"),
            "modelfile.parameters",
            False,
        ),
        (
            {"models": (ServedModel("m", "a", options={"num_ctx": True}),)},
            ("models", "m", "options", "num_ctx"),
            "must be a whole number, not true",
            False,
        ),
        ({"models": (ServedModel("m", "a", source="x@y"),)}, ("models", "m", "from"), "x@y", False),
        (
            {"models": (ServedModel("m", "a", quantize="q8_0"),)},
            ("models", "m", "from"),
            "quantize and modelfile need",
            False,
        ),
        (
            {"models": (ServedModel("m", "a", source="/x.gguf", quantize="q9"),)},
            ("models", "m", "quantize"),
            "q9",
            False,
        ),
        (
            {"models": (ServedModel("m", "a", source="/x.gguf", modelfile={"parameters": {"temprature": 1}}),)},
            ("models", "m", "modelfile", "parameters", "temprature"),
            "is not a parameter",
            False,
        ),
        (
            {"options": {"max_loaded_models": 1}, "models": (ServedModel("m", "a"), ServedModel("n", "b"))},
            ("max_loaded_models",),
            "evict models by itself",
            True,
        ),
    ],
)
def test_validate_reports_problem_at_its_key(
    changes: Mapping[str, Any], path: tuple[str, ...], text: str, warning: bool
) -> None:
    found = ENGINE.validate(context(**changes))
    assert [(problem.path, problem.warning) for problem in found if text in problem.message] == [(path, warning)], found


def test_validate_plain_entry_has_no_problem(tmp_path: Path) -> None:
    options = {"models_dir": str(tmp_path), "kv_cache_type": "q8_0", "flash_attention": True, "num_parallel": 4}
    env = {"OLLAMA_DEBUG": "1", "HTTPS_PROXY": "http://proxy", "OLLAMA_SCHED_SPREAD": "T"}
    assert ENGINE.validate(context(options=options, env=env, models=(ServedModel("a", "ns/a:q8_0"),))) == []


@given(st.text(max_size=8))
def test_validate_env_accepts_only_go_booleans(text: str) -> None:
    found = ENGINE.validate(context(env={"OLLAMA_VULKAN": text}))
    plain = text.strip().strip("\"'")
    assert bool(found) == bool(plain and plain not in GO_BOOLEANS)


@pytest.mark.parametrize(
    ("code", "signal", "lines", "kind"),
    [
        (1, None, ["Error: listen tcp 127.0.0.1:11500: bind: address already in use"], ExitKind.PORT_IN_USE),
        (
            1,
            None,
            ["Error: mkdir /Volumes/X: permission denied: ensure path elements are traversable"],
            ExitKind.BAD_CONFIG,
        ),
        (1, None, ["Error: mkdir /Volumes/X: read-only file system"], ExitKind.BAD_CONFIG),
        (1, None, ['Error: unknown command "server" for "ollama"'], ExitKind.BAD_CONFIG),
        (2, None, ["panic: runtime error: index out of range", "goroutine 1 [running]:"], ExitKind.CRASH),
        (2, None, ["fatal error: runtime: cannot allocate memory"], ExitKind.OOM),
        (None, "SIGKILL", [], ExitKind.CRASH),
        (0, None, [], ExitKind.EXPECTED),
        (None, None, [], ExitKind.UNKNOWN),
        (1, None, ["", "something odd"], ExitKind.CRASH),
    ],
)
def test_classify_exit_reads_code_and_log(
    code: int | None, signal: str | None, lines: list[str], kind: ExitKind
) -> None:
    verdict = ENGINE.classify_exit(code, signal, lines)
    assert verdict.kind is kind
    assert describe_exit(ExitReport(code, signal, kind=verdict.kind, reason=verdict.reason))


# -- its API ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "vram", "expected"),
    [
        (1000, 0, {"host": 1000 + PROCESS_BYTES}),
        (1000, 1000, {"gpu": 1000, "host": PROCESS_BYTES}),
        (1000, 400, {"gpu": 400, "host": 600 + PROCESS_BYTES}),
        (0, 0, {"host": PROCESS_BYTES}),
    ],
)
def test_device_bytes_splits_size(size: Any, vram: Any, expected: Mapping[str, int]) -> None:
    assert device_bytes({"size": size, "size_vram": vram}) == expected


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("tiny", "tiny"),
        ("tiny:latest", "tiny"),
        ("library/tiny:q8_0", "tiny:q8_0"),
        ("registry.ollama.ai/library/tiny", "tiny"),
        ("me/tiny:latest", "me/tiny"),
        ("hf.co/me/tiny:q4", "hf.co/me/tiny:q4"),
    ],
)
def test_canonical_name_drops_implied_parts(text: str, name: str) -> None:
    assert SERVER.canonical_name(text) == name


def test_server_loads_lists_and_unloads(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000000,b=2000000") as server:
            http, endpoint = server.http, server.endpoint
            a, b = ServedModel("A", "a"), ServedModel("B", "b:latest", options={"num_ctx": 512})
            measured = await SERVER.load(http, endpoint, a, 10)
            assert measured == {"host": 1000000 + PROCESS_BYTES}
            await SERVER.load(http, endpoint, b, 10)
            assert {resident.served_as for resident in await SERVER.loaded(http, endpoint)} == {"a", "b"}
            listed = {entry["model"]: entry for entry in (await server.get("/api/ps"))["models"]}
            assert listed["b:latest"]["context_length"] == 512
            await SERVER.unload(http, endpoint, a, 10)
            assert [resident.served_as for resident in await SERVER.loaded(http, endpoint)] == ["b"]
            await SERVER.unload(http, endpoint, a, 10)  # already unloaded: no error

    asyncio.run(go())


def test_load_embedding_model_uses_its_route(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "nomic-embed=1000") as server:
            for embedding in (True, False):
                model = ServedModel("e", "nomic-embed", embedding=embedding)
                await SERVER.load(server.http, server.endpoint, model, 10)
                outcome = await ENGINE.alive(server.http, server.endpoint, model, 10)
                assert outcome.ok, outcome
                await SERVER.unload(server.http, server.endpoint, model, 10)

    asyncio.run(go())


def test_load_missing_model_error_has_hint(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000") as server:
            with pytest.raises(EngineError, match="has no model nope") as caught:
                await SERVER.load(server.http, server.endpoint, ServedModel("mine", "nope"), 10)
            assert not caught.value.recoverable
            assert "ollama pull nope" in (caught.value.hint or "")
            assert "models.mine.from" in (caught.value.hint or "")

    asyncio.run(go())


def test_load_busy_server_is_recoverable(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000", "--busy") as server:
            with pytest.raises(EngineError, match="server busy") as caught:
                await SERVER.load(server.http, server.endpoint, ServedModel("a", "a"), 10)
            assert caught.value.recoverable

    asyncio.run(go())


def test_load_exceeding_timeout_is_an_error(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000", "--load-time", "60") as server:
            with pytest.raises(EngineError, match="did not answer within") as caught:
                await SERVER.load(server.http, server.endpoint, ServedModel("a", "a"), 0.3)
            assert caught.value.recoverable

    asyncio.run(go())


def test_alive_never_causes_a_load(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000,b=1000") as server:
            for model in (None, ServedModel("a", "a")):
                assert (await ENGINE.alive(server.http, server.endpoint, model, 5)).ok
            assert await SERVER.loaded(server.http, server.endpoint) == ()
            await SERVER.load(server.http, server.endpoint, ServedModel("a", "a"), 5)
            outcome = await ENGINE.alive(server.http, server.endpoint, None, 5)
            assert outcome.ok
            assert "one token" in outcome.detail

    asyncio.run(go())


def test_alive_hanging_runner_fails(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "ollama", "--models", "a=1000", "--hang-after", "0") as server:
            await server.post("/api/generate", {"model": "a", "keep_alive": -1, "stream": False})
            if not await SERVER.loaded(server.http, server.endpoint):
                pytest.fail("the fake did not load")
            outcome = await ENGINE.alive(server.http, server.endpoint, None, 0.3)
            assert not outcome.ok
            assert "within" in outcome.detail

    asyncio.run(go())


def test_loaded_without_server_is_one_sentence(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "openai") as server:  # a server of another dialect
            with pytest.raises(EngineError):
                await SERVER.loaded(server.http, server.endpoint)
            outcome = await ENGINE.alive(server.http, server.endpoint, None, 2)
            assert not outcome.ok
            assert "Traceback" not in outcome.detail

    asyncio.run(go())


def test_pinned_options_are_load_time_options_only() -> None:
    assert pinned_options(ServedModel("a", "a", options={"num_ctx": 1, "temperature": 2})) == {"num_ctx": 1}
