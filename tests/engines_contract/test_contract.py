"""Test the contract for every engine that the registry names, against a fake server of its dialect.

A new engine adds one row to CASES. A row missing is a failure, not a skip.
"""

from __future__ import annotations

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import tiny_gguf
from fleetd.core.data.specs import Capabilities, ExitKind, ExitReport, Footprint, Probes, ProbeSpec, describe_exit
from fleetd.engines import registry
from fleetd.engines.base import Api, Endpoint, Engine, Launch, LaunchContext, ModelServer, ServedModel
from fleetd.engines.listed_models import LISTED_MODELS
from fleetd.errors import EngineError
from tests.fakes.launch import command, fake
from tests.support.ports import free_port
from tests.support.waiting import until

SECRET = "sk-very-secret-4711"
GGUF = Path(__file__).parent / "missing.gguf"


@dataclass(frozen=True)
class Case:
    """How an engine is tested. `api` is the fake's dialect; `serves`: its own launch can start the fake."""

    api: str
    options: Mapping[str, Any] = field(default_factory=dict)
    program: tuple[str, ...] = ("/opt/engine/program", "serve")
    serves: bool = True
    held: ServedModel = ServedModel("fleet-name", "fake")


CASES: dict[str, Case] = {
    "external": Case("openai", program=(), serves=False),
    "llamacpp": Case("llamacpp", {"model": str(GGUF)}, ("/opt/llama-server",)),
    "lmstudio": Case("lmstudio", serves=False),
    "ollama": Case("ollama"),
    "process": Case("openai", program=("/opt/server", "--port", "18080")),
    "vllm": Case("vllm", {"model": "org/model"}),
}
NAMES = registry.names()


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def context_of(name: str, **more: Any) -> LaunchContext:
    case, engine = CASES[name], registry.load(name)
    given = {**case.options, **more.pop("options", {})}
    base = LaunchContext(
        name="entry-1", options=engine.options(**given), host="127.0.0.1", port=18080, command=case.program, served_as="fake",
        config_dir=Path("/etc/fleetd"), device="host",
    )  # fmt: skip
    return replace(base, **more)


def ask(
    endpoint: str, action: Callable[[aiohttp.ClientSession, Endpoint], Awaitable[Any]], key: str | None = None
) -> Any:
    async def run() -> Any:
        async with aiohttp.ClientSession() as http:
            return await action(http, Endpoint(endpoint, key))

    return asyncio.run(run())


def load(models: ModelServer, base_url: str, model: ServedModel, timeout_s: float) -> Mapping[str, int]:
    sizes: Mapping[str, int] = ask(base_url, lambda http, end: models.load(http, end, model, timeout_s))
    return sizes


def contains(argv: tuple[str, ...], words: tuple[str, ...]) -> bool:
    return any(argv[start : start + len(words)] == words for start in range(len(argv)))


# -- pure methods -------------------------------------------------------------------------------------------------------


def test_every_engine_has_a_case() -> None:
    assert set(NAMES) == set(CASES)
    assert list(NAMES) == sorted(NAMES)


def test_registry_loads_engine_by_its_name(name: str) -> None:
    engine: Engine = registry.load(name)
    assert engine.name == name
    assert registry.load(name) is engine
    assert isinstance(engine.capabilities, Capabilities)
    config = engine.options.model_config
    assert config.get("extra") == "forbid"
    assert config.get("frozen") is True


def test_registry_names_imports_no_engine() -> None:
    program = (
        "import sys; from fleetd.engines import registry; registry.names();"
        "print([n for n in registry.BUILT_IN if 'fleetd.engines.' + n in sys.modules], 'aiohttp' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "[] False"


def test_launch_is_pure_and_complete(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, context = registry.load(name), context_of(name)
    if not engine.capabilities.owns_process:
        with pytest.raises(EngineError):
            engine.launch(context)
        return
    monkeypatch.setattr(subprocess, "Popen", None)
    first = engine.launch(context)
    assert first == engine.launch(context)
    assert isinstance(first, Launch)
    assert contains(first.argv, CASES[name].program)
    assert all(isinstance(word, str) and "\0" not in word for word in first.argv)
    assert all(isinstance(key, str) and isinstance(value, str) for key, value in first.env.items())
    assert all(Path(path).is_absolute() for path in first.requires)
    assert not set(first.unset_env) & set(first.env)


def test_launch_passes_args(name: str) -> None:
    engine = registry.load(name)
    if engine.capabilities.owns_process:
        launch = engine.launch(context_of(name, args=("--extra-word", "5")))
        assert contains(launch.argv, ("--extra-word", "5"))


def test_launch_keeps_variables_of_the_user(name: str) -> None:
    engine = registry.load(name)
    if not engine.capabilities.owns_process:
        return
    for key in engine.launch(context_of(name)).unset_env:
        assert key not in engine.launch(context_of(name, env={key: "x"})).unset_env


def test_launch_depends_on_the_port(name: str) -> None:
    engine = registry.load(name)
    if engine.capabilities.owns_process and name != "process":
        one, other = engine.launch(context_of(name)), engine.launch(context_of(name, port=18081))
        assert (one.argv, one.env) != (other.argv, other.env)


def test_launch_keeps_secrets_off_the_command_line(name: str) -> None:
    engine = registry.load(name)
    if "api_key" not in engine.options.model_fields or not engine.capabilities.owns_process:
        return
    launch = engine.launch(context_of(name, options={"api_key": SECRET}))
    assert SECRET not in " ".join(launch.argv)
    carriers = {key for key, value in launch.env.items() if SECRET in value}
    assert carriers or name in ("lmstudio", "ollama")  # the key is only sent by fleetd
    assert carriers <= launch.secret_env


def test_options_do_not_print_secrets(name: str) -> None:
    engine = registry.load(name)
    if "api_key" in engine.options.model_fields:
        options = context_of(name, options={"api_key": SECRET}).options
        assert SECRET not in repr(options)
        assert SECRET not in options.model_dump_json()


def test_options_have_descriptions(name: str) -> None:
    fields = registry.load(name).options.model_fields
    assert [key for key, field in fields.items() if not field.description] == []


def test_validate_accepts_a_plain_entry(name: str) -> None:
    case = CASES[name]
    external = not registry.load(name).capabilities.owns_process
    context = context_of(name, command=() if external else case.program)
    assert [str(p) for p in registry.load(name).validate(context) if not p.warning] == []


def test_validate_problem_paths_are_options_or_entry_keys(name: str) -> None:
    engine = registry.load(name)
    for problem in engine.validate(context_of(name, env={"OLLAMA_HOST": "x", "LLAMA_ARG_PORT": "1", "VLLM_PORT": "1"})):
        assert isinstance(problem.path, tuple)
        assert problem.message
        assert "\n" not in problem.message
        if problem.path:
            assert problem.path[0] in {*engine.options.model_fields, "env", "args", "command", "models"}


def mechanisms(probe: ProbeSpec) -> int:
    return sum((probe.http is not None, probe.tcp, bool(probe.exec), probe.log_line is not None, probe.completion))


def test_probes_have_one_mechanism_and_valid_times(name: str) -> None:
    engine = registry.load(name)
    probes = engine.probes(context_of(name).options)
    assert isinstance(probes, Probes)
    assert probes.startup is not None
    for probe in filter(None, (probes.startup, probes.readiness, probes.liveness)):
        assert mechanisms(probe) == 1
        assert probe.period_s > 0
        assert probe.timeout_s > 0
        assert probe.failures >= 1
        if probe.http is not None:
            assert probe.http.startswith("/")


def test_api_and_concurrency_are_valid(name: str) -> None:
    engine, context = registry.load(name), context_of(name)
    assert engine.api(context.options) in set(Api)
    assert engine.concurrency(context.options) >= 1


@pytest.mark.parametrize("device", ["host", "gpu0", "unified", None])
def test_estimate_is_a_footprint_or_none(name: str, device: str | None, tmp_path: Path) -> None:
    path = tiny_gguf.write(tmp_path / "m.gguf")
    options = {"model": str(path)} if name == "llamacpp" else {}
    engine, context = registry.load(name), context_of(name, device=device, options=options)
    for model in (None, replace(CASES[name].held, source=str(path))):
        found = engine.estimate(context, model)
        if found is None:
            continue
        assert isinstance(found, Footprint)
        assert set(found.bytes) <= {device or "host", "host"}
        assert all(size > 0 for size in found.bytes.values())
    if name == "llamacpp":
        assert engine.estimate(context, None)


def test_estimate_missing_file_is_none() -> None:
    assert registry.load("llamacpp").estimate(context_of("llamacpp"), None) is None


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from(NAMES),
    code=st.none() | st.integers(-255, 255),
    number=st.none() | st.sampled_from(["SIGKILL", "SIGTERM", "SIGSEGV", "SIG99"]),
    tail=st.lists(st.text(max_size=200), max_size=20),
)
def test_classify_exit_always_has_a_short_text(
    which: str, code: int | None, number: str | None, tail: list[str]
) -> None:
    verdict = registry.load(which).classify_exit(None if number else code, number, tail)
    assert isinstance(verdict.kind, ExitKind)
    text = describe_exit(ExitReport(None if number else code, number, kind=verdict.kind, reason=verdict.reason))
    assert text.strip()
    assert len(text) < 1000


@pytest.mark.parametrize("line", ["bind: address already in use", "OSError: [Errno 98] Address already in use"])
def test_classify_exit_used_port_is_recognised(name: str, line: str) -> None:
    engine = registry.load(name)
    if engine.capabilities.owns_process and name != "lmstudio":
        assert engine.classify_exit(1, None, ["hello", line, "bye"]).kind is ExitKind.PORT_IN_USE


# -- against a server of its dialect ------------------------------------------------------------------------------------


@pytest.fixture
def server_flags(name: str) -> list[str]:
    return ["--api", CASES[name].api, "--models", "fake,other", "--memory", "100000", "--tokens", "2"]


def test_alive_requests_real_work(name: str, server_flags: list[str]) -> None:
    engine, held = registry.load(name), CASES[name].held
    with fake(*server_flags) as server:
        if engine.server is not None and engine.capabilities.owns_process:
            load(engine.server, server.base_url, held, 10)
        outcome = ask(server.base_url, lambda http, end: engine.alive(http, end, held, 10))
        assert outcome.ok, outcome.detail
        if engine.capabilities.owns_process:
            until(lambda: server.stats()["finished"] == 1, "the work is counted")


@pytest.mark.parametrize("fault", ["--hang", "--garbage"])
def test_alive_broken_server_fails_in_time(name: str, fault: str, server_flags: list[str]) -> None:
    if fault == "--garbage" and not registry.load(name).capabilities.owns_process:
        return  # an external server is only asked for its list, which is valid
    engine, held = registry.load(name), CASES[name].held
    with fake(*server_flags, fault) as server:
        if engine.server is not None and engine.capabilities.owns_process and fault == "--garbage":
            load(engine.server, server.base_url, held, 10)
        begun = time.monotonic()
        outcome = ask(server.base_url, lambda http, end: engine.alive(http, end, held, 0.5))
        assert not outcome.ok
        assert outcome.detail
        assert time.monotonic() - begun < 5


def test_alive_without_listener_fails(name: str) -> None:
    engine, held = registry.load(name), CASES[name].held
    with socket.socket() as unheard:
        unheard.bind(("127.0.0.1", 0))
        outcome = ask(
            f"http://127.0.0.1:{unheard.getsockname()[1]}", lambda http, end: engine.alive(http, end, held, 2)
        )
    assert not outcome.ok
    assert outcome.detail


def test_server_loads_and_unloads(name: str, server_flags: list[str]) -> None:
    engine, held = registry.load(name), CASES[name].held
    many = engine.capabilities.many_models and engine.capabilities.owns_process
    models = engine.server if many else LISTED_MODELS  # an external server of one model is asked for its list
    assert models is not None
    assert (engine.server is not None) == engine.capabilities.many_models
    with fake(*server_flags, "--load-time", "0.05" if many else "0") as server:
        if not many:
            if engine.capabilities.owns_process:
                with pytest.raises(EngineError):
                    load(models, server.base_url, replace(held, served_as="another-model"), 2)
                until(lambda: ask(server.base_url, models.loaded), "it lists its model")
            return
        assert ask(server.base_url, models.loaded) == ()
        sizes = load(models, server.base_url, held, 10)
        assert all(size >= 0 for size in sizes.values())
        assert [resident.served_as for resident in ask(server.base_url, models.loaded)] == [held.served_as]
        ask(server.base_url, lambda http, end: models.unload(http, end, held, 10))
        assert not ask(server.base_url, models.loaded)
        assert server.stats()["held_bytes"] == 0


def test_server_load_failure_is_an_error(name: str, server_flags: list[str]) -> None:
    engine = registry.load(name)
    if engine.server is None or not engine.capabilities.owns_process:
        return
    with fake(*server_flags) as server, pytest.raises(EngineError):
        load(engine.server, server.base_url, ServedModel("x", "unknown-model"), 5)
    with fake(*server_flags, "--fail-load") as server, pytest.raises(EngineError):
        load(engine.server, server.base_url, CASES[name].held, 5)
    with fake(*server_flags, "--load-time", "30") as server, pytest.raises(EngineError):
        load(engine.server, server.base_url, CASES[name].held, 0.3)


def test_launch_serves_on_its_port(name: str, tmp_path: Path) -> None:
    """Start the fake in place of the program: the flags and variables of the launch must bring it up on its port."""
    case, engine = CASES[name], registry.load(name)
    if not case.serves:
        return
    port = free_port()
    stand_in = (*command("--api", case.api), *(("--port", str(port)) if name == "process" else ()))
    launch = engine.launch(context_of(name, command=stand_in, port=port))
    startup = engine.probes(context_of(name).options).startup
    assert startup is not None
    with (
        (tmp_path / "log").open("wb") as log,
        subprocess.Popen(
            launch.argv, env={"PATH": "/usr/bin:/bin", **launch.env}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
        ) as process,
    ):
        try:
            base = f"http://127.0.0.1:{port}"

            async def ready(http: aiohttp.ClientSession, end: Endpoint) -> bool:
                async with http.get(end.base_url + (startup.http or "/v1/models")) as response:
                    return response.status == 200

            def up() -> bool:
                assert process.poll() is None, (tmp_path / "log").read_text()
                try:
                    return bool(ask(base, ready))
                except aiohttp.ClientError:
                    return False

            until(up, "the startup probe succeeds")
        finally:
            process.kill()


@pytest.mark.parametrize("which", NAMES)
def test_exit_is_described_once(which: str) -> None:
    for code, signal in ((None, "SIGKILL"), (3, None)):
        verdict = registry.load(which).classify_exit(code, signal, [])
        text = describe_exit(ExitReport(code, signal, kind=verdict.kind, reason=verdict.reason))
        assert text.count(str(signal or code)) == 1
        assert "ended" not in text
