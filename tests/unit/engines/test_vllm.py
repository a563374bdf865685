"""The engine `vllm`: its command line and its log as tables, sleep and probes against the fake server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from aiohttp import ClientSession, web
from aiohttp.test_utils import TestServer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from fleetd.core.data.specs import ExitKind, ExitReport, describe_exit
from fleetd.engines.base import Endpoint, LaunchContext, ServedModel, capabilities_of
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.engines.registry import load
from fleetd.engines.vllm.command import CONSTANTS
from fleetd.engines.vllm.engine import ENGINE, VllmStartupLog
from fleetd.engines.vllm.log import learned_kv_bytes, phase
from fleetd.engines.vllm.options import REMOVED, VllmOptions, words
from fleetd.engines.vllm.sleep import VllmSleeper, canary, is_garbage, is_sleeping, sleep, wake
from fleetd.errors import EngineError
from tests.support.engines import fake

GIB = 1 << 30
SLEEPER = VllmSleeper()
UUID = "GPU-2f9b3c6a-1111-2222-3333-444455556666"


def context(**changes: Any) -> LaunchContext:
    options = {"model": "Qwen/Qwen2.5-0.5B", **changes.pop("options", {})}
    values = {
        "name": "coder", "host": "127.0.0.1", "port": 8001, "command": ("vllm", "serve"), "served_as": "coder",
        "device": "gpu0", "device_uuid": UUID, "device_total_bytes": 80 * GIB, **changes,
    }  # fmt: skip
    return LaunchContext(options=VllmOptions(**options), **values)


def line(**changes: Any) -> list[str]:
    return list(ENGINE.launch(context(**changes)).argv)


def after(argv: list[str], flag: str) -> str:
    return argv[argv.index(flag) + 1]


def folder(tmp_path: Path, **config: Any) -> Path:
    """A model of one small tensor, 2 layers, 2 KV heads of 32: 512 bytes of KV cache per token."""
    model = tmp_path / "model"
    model.mkdir()
    shape = {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 1000, "num_hidden_layers": 2, "head_dim": 32}
    heads = {
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "torch_dtype": "bfloat16",
    }
    (model / "config.json").write_text(json.dumps({**shape, **heads, **config}))
    header = json.dumps({"w": {"dtype": "BF16", "shape": [500], "data_offsets": [0, 1000]}}).encode()
    (model / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(1000))
    return model


# -- the command line ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("max_model_len", 8192, ["--max-model-len", "8192"]),
        ("max_model_len", -1, ["--max-model-len=-1"]),
        ("enforce_eager", True, ["--enforce-eager"]),
        ("enable_prefix_caching", False, ["--no-enable-prefix-caching"]),
        ("gpu_memory_utilization", 0.8, ["--gpu-memory-utilization", "0.8"]),
        ("cpu_offload_gb", 4.0, ["--cpu-offload-gb", "4"]),
        ("cudagraph_capture_sizes", (1, 2, 4), ["--cudagraph-capture-sizes", "1", "2", "4"]),
        ("hf_overrides", {"a": [1, "é"]}, ["--hf-overrides", '{"a":[1,"é"]}']),
        ("lora_modules", [{"name": "x"}], ["--lora-modules", '{"name": "x"}']),
        ("dtype", None, []),
        ("lora_modules", (), []),
    ],
)
def test_words_of_a_value(name: str, value: Any, expected: list[str]) -> None:
    assert words(name, value) == expected


@given(st.dictionaries(st.text(max_size=5), st.one_of(st.integers(), st.text(max_size=5), st.booleans()), max_size=3))
def test_words_of_a_mapping_round_trip(value: dict[str, Any]) -> None:
    flag, text = words("compilation_config", value)
    assert flag == "--compilation-config"
    assert json.loads(text) == value


def test_launch_writes_the_whole_command_line() -> None:
    options = {
        "max_model_len": "8K", "kv_cache_memory": "2GiB", "gpu_memory_utilization": 0.5, "enable_sleep_mode": True,
        "dtype": "bfloat16", "tensor_parallel_size": 1, "shutdown_timeout": "30s", "extra_args": {"numa-bind": True},
    }  # fmt: skip
    assert line(options=options, args=("--foo",)) == [
        "vllm", "serve", "Qwen/Qwen2.5-0.5B", "--served-model-name", "coder", "--host", "127.0.0.1", "--port", "8001",
        "--dtype", "bfloat16", "--max-model-len", "8192", "--gpu-memory-utilization", "0.5",
        "--kv-cache-memory-bytes", str(2 * GIB), "--enable-sleep-mode", "--shutdown-timeout", "30", "--numa-bind",
        "--disable-access-log-for-endpoints", "/health,/metrics,/ping,/v1/models,/is_sleeping", "--foo",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("command", "start"),
    [
        (("vllm", "serve"), ["vllm", "serve", "Qwen/Qwen2.5-0.5B"]),
        (("/venv/bin/vllm",), ["/venv/bin/vllm", "serve", "Qwen/Qwen2.5-0.5B"]),
        (
            ("python", "-m", "vllm.entrypoints.openai.api_server"),
            ["python", "-m", "vllm.entrypoints.openai.api_server", "--model", "Qwen/Qwen2.5-0.5B"],
        ),
    ],
)
def test_launch_keeps_the_users_command(command: tuple[str, ...], start: list[str]) -> None:
    assert line(command=command)[: len(start)] == start


def test_launch_requires_a_local_folder(tmp_path: Path) -> None:
    launch = ENGINE.launch(context(options={"model": "./models/qwen"}, config_dir=tmp_path))
    assert launch.requires == (str(tmp_path / "models" / "qwen"),)
    assert str(tmp_path / "models" / "qwen") in launch.argv
    assert ENGINE.launch(context()).requires == ()


def test_launch_keeps_keys_off_the_command_line() -> None:
    launch = ENGINE.launch(context(options={"api_key": "s3cret-key"}))
    assert launch.env["VLLM_API_KEY"] == "s3cret-key"
    assert "VLLM_API_KEY" in launch.secret_env
    assert not any("s3cret-key" in word for word in launch.argv)
    assert "s3cret-key" not in repr(context(options={"api_key": "s3cret-key"}))


def test_launch_options_become_variables() -> None:
    env = ENGINE.launch(context(options={"enable_sleep_mode": True, "offline": True, "cache_root": "/c"})).env
    assert CONSTANTS.items() <= env.items()
    assert env["CUDA_VISIBLE_DEVICES"] == UUID
    assert env["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"
    assert env["VLLM_SERVER_DEV_MODE"] == "1"
    assert (env["HF_HUB_OFFLINE"], env["TRANSFORMERS_OFFLINE"], env["VLLM_CACHE_ROOT"]) == ("1", "1", "/c")
    plain = ENGINE.launch(context())
    assert "VLLM_SERVER_DEV_MODE" in plain.unset_env
    assert {"VLLM_PORT", "PROMETHEUS_MULTIPROC_DIR"} <= set(plain.unset_env)


def test_launch_hashed_variables_are_equal_for_all() -> None:
    one, other = (ENGINE.launch(context(name=name, port=port)).env for name, port in (("a", 1), ("b", 2)))
    assert one == other


@pytest.mark.parametrize("name", sorted(REMOVED))
def test_validate_removed_option_names_replacement(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        VllmOptions.model_validate({"model": "m", name: 1})
    assert VllmOptions.refused[name] == REMOVED[name]


@pytest.mark.parametrize(
    "options",
    [
        {"gpu_memory_utilization": 1.5},
        {"gpu_memory_utilization": 0},
        {"max_model_len": "long"},
        {"max_model_len": 0},
        {"kv_cache_memory": "2G"},
        {"tensor_parallel_size": 0},
        {"dtype": "int8"},
        {"sleep_level": 3},
        {"host": "0.0.0.0"},
        {"hf_token": "x"},
        {"max_modle_len": 1},
        {"model": ""},
    ],
)
def test_options_wrong_value_is_rejected(options: Mapping[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VllmOptions.model_validate({"model": "m", **options})


@pytest.mark.parametrize(
    ("text", "tokens"), [("8k", 8000), ("8K", 8192), ("1m", 1_000_000), ("2048", 2048), ("auto", "auto"), (-1, -1)]
)
def test_length_type_parses_tokens(text: Any, tokens: Any) -> None:
    assert VllmOptions(model="m", max_model_len=text).max_model_len == tokens


@pytest.mark.parametrize(
    ("changes", "text", "warning"),
    [
        ({"host": "0.0.0.0"}, "loopback only", False),
        ({"options": {"extra_args": {"swap-space": 4}}}, "no longer has swap space", False),
        ({"options": {"extra_args": {"dtype": "half"}}}, "use the option dtype", False),
        ({"options": {"extra_args": {"no-enforce-eager": True}}}, "use the option enforce_eager", False),
        ({"args": ("--port", "1")}, "set the entry's `port`", False),
        ({"args": ("-tp", "2")}, "with its long name", False),
        ({"args": ("--api-key=x",)}, "use the option api_key", False),
        ({"env": {"VLLM_PROCESS_NAME_PREFIX": "x"}}, "same for every instance", False),
        ({"env": {"HF_HUB_OFFLINE": "1"}, "options": {"offline": True}}, "options.offline sets it", False),
        ({"options": {"enable_sleep_mode": True}, "device": "host"}, "cannot sleep on the CPU", False),
        ({"options": {"sleep_level": 2}}, "needs enable_sleep_mode: true", False),
        ({"options": {"sleep_level": 1}}, "needs enable_sleep_mode: true", False),
        ({"options": {"enable_auto_tool_choice": True}}, "needs tool_call_parser", False),
        ({"options": {"lora_modules": ["a=b"]}}, "needs enable_lora", False),
        ({}, "takes 92% of the device", True),
        ({"device": "host"}, "takes 92% of the machine", True),
        ({"options": {"kv_cache_memory": "2GiB"}}, "set gpu_memory_utilization too", True),
        ({"options": {"tensor_parallel_size": 2}}, "2 devices are needed", True),
    ],
)
def test_validate_reports_problem(changes: Mapping[str, Any], text: str, warning: bool) -> None:
    found = ENGINE.validate(context(**changes))
    assert [problem.warning for problem in found if text in problem.message] == [warning], found


def test_capabilities_depend_on_sleep_mode() -> None:
    assert ENGINE.capabilities.exclusive_start
    assert ENGINE.capabilities.exit_zero_is_failure
    assert not capabilities_of(ENGINE, VllmOptions(model="m")).can_sleep
    assert capabilities_of(ENGINE, VllmOptions(model="m", enable_sleep_mode=True)).can_sleep
    assert capabilities_of(ENGINE, VllmOptions(model="m", enable_sleep_mode=True)).can_sleep
    assert capabilities_of(load("process"), None) == load("process").capabilities


@pytest.mark.parametrize("level", [0, 3, 1.5, "deep"])
def test_options_invalid_sleep_level_is_rejected(level: Any) -> None:
    with pytest.raises(ValidationError, match="sleep_level"):
        VllmOptions(model="m", enable_sleep_mode=True, sleep_level=level)


def test_launch_leaves_out_the_sleep_level() -> None:
    argv = line(options={"enable_sleep_mode": True, "sleep_level": 2})
    assert "--enable-sleep-mode" in argv
    assert not [word for word in argv if "level" in word]


# -- memory -------------------------------------------------------------------------------------------------------------


def asleep(awake: dict[str, int], **changes: Any) -> dict[str, int] | None:
    options = {"enable_sleep_mode": True, **changes.pop("options", {})}
    found = SLEEPER.asleep_bytes(context(options=options, **changes), awake)
    return None if found is None else dict(found)


def test_asleep_bytes_per_level_and_device(tmp_path: Path) -> None:
    kept, hub = int(1.5 * GIB), {"kv_cache_memory": "2GiB"}
    awake = {"gpu0": 10 * GIB, "host": GIB}
    assert asleep(awake, options={"sleep_level": 2}) == {"gpu0": kept, "host": GIB}
    assert asleep(awake, options=hub) == {"gpu0": kept, "host": GIB + ceil(8 * GIB * 1.2)}, "an upper bound"
    local = {"model": str(folder(tmp_path)), "kv_cache_memory": "2GiB"}
    found = asleep(awake, options=local)
    assert found is not None
    assert found["gpu0"] == kept
    assert GIB < found["host"] < GIB + 10_000, "the weights of the file, a little more for how they are pinned"
    assert asleep({"gpu0": GIB}, options={"sleep_level": 2}) == {"gpu0": GIB}, "never more than it takes awake"
    assert asleep({"unified": 10 * GIB}, device="unified", options={"sleep_level": 2}) == {"unified": kept}
    assert asleep({"unified": 10 * GIB}, device="unified", options=hub) == {"unified": kept + ceil(8 * GIB * 1.2)}
    assert asleep({}) is None, "unknown size awake, unknown size asleep"


def test_estimate_share_of_the_device() -> None:
    footprint = ENGINE.estimate(context(options={"gpu_memory_utilization": 0.5}), None)
    assert footprint is not None
    assert footprint.bytes == {"gpu0": 40 * GIB}
    default = ENGINE.estimate(context(), None)
    assert default is not None
    assert default.total_bytes > 73 * GIB
    assert ENGINE.estimate(context(device_total_bytes=None), None) is None


def test_launch_configured_cache_sets_fitting_share(tmp_path: Path) -> None:
    ready = context(options={"model": str(folder(tmp_path)), "kv_cache_memory": "2GiB"})
    footprint = ENGINE.estimate(ready, None)
    assert footprint is not None
    assert 2 * GIB < footprint.bytes["gpu0"] < 5 * GIB
    assert footprint.bytes["host"] > GIB
    share = float(after(list(ENGINE.launch(ready).argv), "--gpu-memory-utilization"))
    assert footprint.bytes["gpu0"] <= share * 80 * GIB < footprint.bytes["gpu0"] + GIB
    assert not [problem for problem in ENGINE.validate(ready) if "gpu_memory_utilization" in problem.message]


def test_estimate_model_on_the_hub_is_unknown() -> None:
    assert ENGINE.estimate(context(options={"kv_cache_memory": "2GiB"}), None) is None


def test_estimate_on_cpu_is_host_only(tmp_path: Path) -> None:
    options = {"model": str(folder(tmp_path)), "kv_cache_memory": "1GiB", "enforce_eager": True}
    footprint = ENGINE.estimate(context(options=options, device="host", device_total_bytes=24 * GIB), None)
    assert footprint is not None
    assert set(footprint.bytes) == {"host"}
    assert 3 * GIB < footprint.bytes["host"] < 5 * GIB


@pytest.mark.parametrize(
    ("length", "cache", "enough"), [(4096, "4MiB", True), (4096, "1MiB", False), (1024, "1MiB", True)]
)
def test_validate_cache_below_one_request_is_a_problem(tmp_path: Path, length: int, cache: str, enough: bool) -> None:
    options = {"model": str(folder(tmp_path)), "kv_cache_memory": cache, "max_model_len": length}
    found = [problem for problem in ENGINE.validate(context(options=options)) if not problem.warning]
    assert [problem.path for problem in found] == ([] if enough else [("kv_cache_memory",)])


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000])
def test_estimate_broken_folder_is_unknown(tmp_path: Path, text: str) -> None:
    model = folder(tmp_path)
    (model / "config.json").write_text(text)
    ready = context(options={"model": str(model), "kv_cache_memory": "2GiB"})
    assert ENGINE.estimate(ready, None) is None
    assert ENGINE.launch(ready).argv


# -- the log ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Loading safetensors checkpoint shards:  50% Completed | 2/4", "loading weights 50%"),
        ("INFO 10-01 [gpu_model_runner.py:1] Starting to load model Qwen/Qwen2.5-0.5B...", "loading weights"),
        ("INFO Loading weights took 3.21 seconds", "weights loaded"),
        ("INFO Model loading took 14.2487 GiB memory and 4.5 seconds", "weights loaded"),
        ("INFO Dynamo bytecode transform time: 8.44 s", "compiling"),
        ("INFO torch.compile takes 20 s", None),
        ("INFO torch.compile took 20 s", "compiling"),
        ("INFO Available KV cache memory: 4.00 GiB", "memory measured"),
        ("Capturing CUDA graphs (mixed prefill-decode, PIECEWISE):  32%|###", "capturing graphs 32%"),
        ("INFO Graph capturing finished in 17 secs, took 0.61 GiB", "capturing graphs"),
        ("INFO init engine (profile, create kv cache, warmup model) took 41.07 seconds", "engine initialised"),
        ("INFO:     Application startup complete.", "serving"),
        ("INFO 127.0.0.1 GET /health 200", None),
        ("", None),
    ],
)
def test_phase_of_a_log_line(text: str, expected: str | None) -> None:
    assert phase(text) == expected


def test_learned_kv_bytes_reads_advice_or_measurement() -> None:
    advice = (
        "INFO Free memory on device (78.5/79.1 GiB) on startup. Replace gpu_memory_utilization config with "
        "`--kv-cache-memory=51111111111` (47.6 GiB) to fit into requested memory, or `--kv-cache-memory=60000000000` "
        "(55.9 GiB) to fully utilize gpu memory."
    )
    assert learned_kv_bytes(["INFO Available KV cache memory: 2.50 GiB", advice]) == 51111111111
    assert learned_kv_bytes(["INFO Available KV cache memory: 2.50 GiB"]) == int(
        2.49 * GIB
    )  # printed with two decimals
    assert learned_kv_bytes(["INFO Auto set (0.52/8.71) GiB for KV cache on node 0, with"]) == int(0.51 * GIB)
    assert learned_kv_bytes(["nothing"]) is None


def test_learned_cache_is_passed_on_unless_configured() -> None:
    line = ["INFO Available KV cache memory: 2.50 GiB"]
    learned = VllmStartupLog().learned(context(), line)
    assert learned == {"kv_cache_memory": int(2.49 * GIB)}
    argv = ENGINE.launch(context(learned=learned)).argv
    assert argv[argv.index("--kv-cache-memory-bytes") + 1] == str(int(2.49 * GIB))
    stated = {"kv_cache_memory": GIB}
    assert VllmStartupLog().learned(context(options=stated), line) == {}
    argv = ENGINE.launch(context(options=stated, learned=learned)).argv
    assert argv.count("--kv-cache-memory-bytes") == 1
    assert argv[argv.index("--kv-cache-memory-bytes") + 1] == str(GIB)
    assert VllmStartupLog().learned(context(options={"extra_args": {"kv-cache-memory": 1}}), line) == {}


CORE = "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"


@pytest.mark.parametrize(
    ("code", "signal", "lines", "kind", "text"),
    [
        (1, None, ["OSError: [Errno 98] Address already in use"], ExitKind.PORT_IN_USE, "in use"),
        (
            1, None,
            [("(EngineCore pid=7) ERROR 10-01 12:00:00 [core.py:7] ValueError: Free memory on device cuda:0 (10.0/79.1 GiB) on "
             "startup is less than desired GPU memory utilization (0.92, 72.8 GiB)."), CORE],
            ExitKind.BAD_CONFIG, "less than desired",
        ),
        (
            1, None,
            ["ValueError: Available memory on node 0 (7.27/8.71 GiB) on startup is less than desired CPU memory utilization"],
            ExitKind.BAD_CONFIG, "CPU memory",
        ),
        (1, None, ["ValueError: No available memory for the cache blocks.", CORE], ExitKind.BAD_CONFIG, "cache blocks"),
        (1, None, ["ValueError: To serve at least one request with the model's max seq len (32768), 4.0 GiB KV"],
         ExitKind.BAD_CONFIG, "max seq len"),
        (1, None, ["Value error, Sleep mode is not supported on current platform."], ExitKind.BAD_CONFIG, "Sleep mode"),
        (2, None, ["api_server.py: error: unrecognized arguments: --swap-space 4"], ExitKind.BAD_CONFIG, "--swap-space"),
        (2, None, [], ExitKind.BAD_CONFIG, "code 2"),
        (1, None, ["huggingface_hub.errors.RepositoryNotFoundError: 404 Client Error."], ExitKind.BAD_CONFIG, "404"),
        (1, None, ["torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB", CORE], ExitKind.OOM, "2.00 GiB"),
        (1, None, ["AssertionError: Error in memory profiling. Initial free memory 1"], ExitKind.CRASH, "profiling"),
        (0, None, ["INFO:     Application shutdown complete."], ExitKind.CRASH, "without a stop request"),
        (0, None, ["vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue."], ExitKind.CRASH, "EngineCore"),
        (1, None, ["KeyError: 'foo'", CORE], ExitKind.CRASH, "KeyError"),
        (None, "SIGKILL", [], ExitKind.CRASH, "SIGKILL"),
        (None, None, [], ExitKind.UNKNOWN, "unknown exit code"),
    ],
)  # fmt: skip
def test_classify_exit_reads_the_log(
    code: int | None, signal: str | None, lines: list[str], kind: ExitKind, text: str
) -> None:
    verdict = ENGINE.classify_exit(code, signal, lines)
    assert verdict.kind is kind
    assert text in describe_exit(ExitReport(code, signal, kind=verdict.kind, reason=verdict.reason))
    assert not verdict.reason.startswith("(EngineCore")


# -- probes and sleep ---------------------------------------------------------------------------------------------------

DEV = {"VLLM_SERVER_DEV_MODE": "1"}


def test_alive_requests_one_token(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny") as server:
            for model in (None, ServedModel("tiny", "tiny")):
                outcome = await ENGINE.alive(server.http, server.endpoint, model, 5)
                assert outcome.ok, outcome
            assert not (await ENGINE.alive(server.http, server.endpoint, ServedModel("x", "other"), 5)).ok
            assert await LISTED_MODELS.load(server.http, server.endpoint, ServedModel("tiny", "tiny"), 5) == {}
            with pytest.raises(EngineError, match="has no model other; it lists tiny"):
                await LISTED_MODELS.load(server.http, server.endpoint, ServedModel("x", "other"), 5)

    asyncio.run(go())


def test_alive_hanging_engine_fails_while_health_is_ok(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", "--hang-after", "0") as server:
            async with server.http.get(server.endpoint.base_url + "/health") as response:
                assert response.status == 200
            outcome = await ENGINE.alive(server.http, server.endpoint, None, 0.3)
            assert not outcome.ok

    asyncio.run(go())


@pytest.mark.parametrize("level", [1, 2])
def test_sleep_and_wake_of_each_level(tmp_path: Path, level: int) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", env=DEV) as server:
            http, endpoint = server.http, server.endpoint
            before = await canary(http, endpoint, "tiny", 5)
            for _ in range(2):
                await sleep(http, endpoint, level, 5)
                assert await is_sleeping(http, endpoint) is True
                assert (await ENGINE.alive(http, endpoint, None, 0.5)).detail == "asleep"
                await wake(http, endpoint, level, 5, served_as="tiny", expected=before)
                assert await is_sleeping(http, endpoint) is False
                assert await canary(http, endpoint, "tiny", 5) == before

    asyncio.run(go())


def test_wake_with_lost_weights_is_an_error(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", env=DEV) as server:
            await sleep(server.http, server.endpoint, 2, 5)
            with pytest.raises(EngineError, match="garbage") as caught:
                await wake(server.http, server.endpoint, 1, 5, served_as="tiny")  # the wrong way to wake from level 2
            assert "kill" in (caught.value.hint or "")

    asyncio.run(go())


@pytest.mark.parametrize("level", [1, 2])
def test_sleeper_keeps_the_canary_of_the_first_sleep(tmp_path: Path, level: int) -> None:
    """The first sleep requests the canary while awake, later ones reuse it."""
    options = VllmOptions(model="tiny", enable_sleep_mode=True, sleep_level=level)

    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", env=DEV) as server:
            http, endpoint = server.http, server.endpoint
            before = await canary(http, endpoint, "tiny", 5)
            known = await SLEEPER.sleep(http, endpoint, options, None, 5)
            assert (known.level, known.canary) == (level, before)
            assert await SLEEPER.is_asleep(http, endpoint, 5)
            await SLEEPER.wake(http, endpoint, known, 5)
            assert not await SLEEPER.is_asleep(http, endpoint, 5)
            assert await SLEEPER.sleep(http, endpoint, options, known, 5) == known
            await SLEEPER.wake(http, endpoint, known, 5)
            assert await canary(http, endpoint, "tiny", 5) == before

    asyncio.run(go())


@pytest.mark.parametrize(
    ("flag", "step", "message"), [("--fail-sleep", "sleep", "freed"), ("--hang-wake", "wake", "not answer")]
)
def test_sleeper_failure_is_an_error(tmp_path: Path, flag: str, step: str, message: str) -> None:
    options = VllmOptions(model="tiny", enable_sleep_mode=True)

    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", flag, env=DEV) as server:
            http, endpoint = server.http, server.endpoint
            if step == "sleep":
                with pytest.raises(EngineError, match=message) as caught:
                    await SLEEPER.sleep(http, endpoint, options, None, 5)
            else:
                known = await SLEEPER.sleep(http, endpoint, options, None, 5)
                with pytest.raises(EngineError, match=message) as caught:
                    await SLEEPER.wake(http, endpoint, known, 0.3)
            assert "kill" in (caught.value.hint or "")

    asyncio.run(go())


def test_canary_of_embedding_model_is_its_vector() -> None:
    """It answers 404 to a completion; the start of its vector serves as canary, and all zeros are garbage too."""
    vector = [0.25, -0.5, 0.125, 0.75, 0.1, 0.2, 0.3, 0.4, 0.9]

    async def serve(request: web.Request) -> web.Response:
        if request.path == "/v1/embeddings":
            return web.json_response({"data": [{"embedding": vector}]})
        return web.json_response({"error": {"message": "no such route"}}, status=404)

    async def go() -> None:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", serve)
        async with TestServer(app) as server, ClientSession() as http:
            endpoint = Endpoint(str(server.make_url("")).rstrip("/"))
            assert await canary(http, endpoint, "pool", 5) == "0.25 -0.5 0.125 0.75 0.1 0.2 0.3 0.4"
            vector[:] = [0.0] * 9
            assert is_garbage(await canary(http, endpoint, "pool", 5))
            vector.clear()
            with pytest.raises(EngineError, match="no such route"):
                await canary(http, endpoint, "pool", 5)

    asyncio.run(go())


def test_sleep_twice_is_an_error(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny", env=DEV) as server:
            await sleep(server.http, server.endpoint, 1, 5)
            with pytest.raises(EngineError, match="sleeps already") as caught:
                await sleep(server.http, server.endpoint, 2, 5)
            assert "kill" in (caught.value.hint or "")

    asyncio.run(go())


def test_sleep_without_sleep_mode_is_an_error(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "vllm", "--model", "tiny") as server:
            assert await is_sleeping(server.http, server.endpoint) is None
            with pytest.raises(EngineError, match="cannot sleep"):
                await sleep(server.http, server.endpoint, 1, 5)

    asyncio.run(go())


@pytest.mark.parametrize(
    ("text", "bad"), [("!!!!!!!!", True), ("! ! ! !", True), ("four five", False), ("", False), ("aa", False)]
)
def test_is_garbage_detects_one_repeated_character(text: str, bad: bool) -> None:
    assert is_garbage(text) is bad
