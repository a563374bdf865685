"""What a right configuration becomes: the contract's example, includes, variables, defaults, places."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fleetd.config.load import LoadedConfig, load
from fleetd.config.schema.fleet import EngineModel, HeldModel, RouteModel
from fleetd.config.schema.process import process_names
from fleetd.config.schema.types import Address, Budget
from fleetd.config.yaml.interpolate import interpolate
from fleetd.config.yaml.source_map import path_text
from fleetd.errors import ConfigError
from tests.support.cpu import slowdown

CONTRACT = Path(__file__).with_name("contract.yaml")


def loaded(folder: Path, text: str, env: Mapping[str, str] | None = None) -> LoadedConfig:
    path = folder / "fleet.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, env or {})


@pytest.fixture
def contract() -> LoadedConfig:
    return load(CONTRACT, {})


def test_load_reads_the_whole_example(contract: LoadedConfig) -> None:
    config = contract.config
    assert (config.version, config.name, config.watch) == (1, "mac-studio", True)
    assert config.gateway.listen == Address("127.0.0.1", 8484)
    assert (config.gateway.max_body, config.gateway.queue.max, config.gateway.queue.timeout) == (64 * 2**20, 512, 120)
    assert config.devices["gpu0"].budget == Budget(None, 0.85)
    assert config.devices["host"].budget == Budget(48 * 2**30, None)
    assert list(config.services) == ["ai-bot"]
    assert list(config.instances) == ["ollama", "studio"]
    assert {name: type(model) for name, model in config.models.items()} == {
        "ulysses": HeldModel,
        "coder": EngineModel,
        "tiny": EngineModel,
        "mlx": EngineModel,
        "chat": RouteModel,
    }
    assert list(config.processes()) == ["ai-bot", "ollama", "studio", "coder", "tiny", "mlx"]


def test_load_reads_a_service(contract: LoadedConfig) -> None:
    bot = contract.config.services["ai-bot"]
    assert bot.command == ("node", "./dist/index.js")
    assert bot.env == {"NODE_ENV": "production"}
    assert bot.env_file == (".env",)
    assert bot.depends_on == {"ollama": "ready"}
    assert bot.restart.backoff.initial == 0.5
    assert bot.restart.crash_loop.window == 60
    assert (bot.stop.signal, bot.stop.timeout, bot.stop.kill, bot.stop.command) == ("SIGTERM", 10, "set", None)
    assert bot.probes.startup is not None
    assert bot.probes.startup.ways == ("http",)
    assert bot.probes.startup.deadline == 300
    assert bot.logs.max_size == 50 * 2**20
    assert bot.limits.cpu == (0, 1)
    assert bot.schedule is not None
    assert bot.schedule.restart == "0 4 * * *"
    assert bot.watch is not None
    assert bot.watch.paths == ("dist",)
    assert (bot.max_age, bot.user, bot.umask) == (86400, None, 0o022)


def test_load_reads_an_instance_and_its_models(contract: LoadedConfig) -> None:
    ollama = contract.config.instances["ollama"]
    assert ollama.options["kv_cache_type"] == "q8_0"
    assert ollama.env == {"OLLAMA_DEBUG": "1"}
    assert ollama.runtime is not None
    assert ollama.runtime.docker.gpus == ("all",)
    assert contract.config.instances["studio"].external == "http://10.0.0.102:1234"
    ulysses = contract.config.models["ulysses"]
    assert isinstance(ulysses, HeldModel)
    assert ulysses.instance == ("ollama-1", "ollama-2")
    assert ulysses.modelfile is not None
    assert ulysses.modelfile.parameters == {"temperature": 0.7, "num_ctx": 4096}
    assert ulysses.from_ is not None
    assert ulysses.from_.endswith("TSC-ULYSSES_f16.gguf")
    assert (ulysses.memory, ulysses.ttl, ulysses.queue.max) == ({"gpu0": 7 * 2**30, "host": 2**30}, 600, 64)
    chat = contract.config.models["chat"]
    assert isinstance(chat, RouteModel)
    assert [(one.to, one.weight) for one in chat.route] == [("coder", 90), ("ulysses", 10)]


def test_load_empty_fleet_has_documented_defaults(tmp_path: Path) -> None:
    config = loaded(tmp_path, "version: 1\n").config
    assert config.gateway.listen == Address("127.0.0.1", 8484)
    assert config.paths.run == "~/.fleetd/run"
    assert config.processes() == {}


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("node ./dist/index.js --name 'a b'", ("node", "./dist/index.js", "--name", "a b")),
        ("[node, --port, 8080, --flag, true, 012]", ("node", "--port", "8080", "--flag", "true", "012")),
        ("'echo $$HOME; ls | wc'", ("echo", "$HOME;", "ls", "|", "wc")),
        ("[mlx_lm.server, --port, '{port}']", ("mlx_lm.server", "--port", "{port}")),
    ],
)
def test_load_command_is_split_into_words(command: str, words: tuple[str, ...], tmp_path: Path) -> None:
    assert loaded(tmp_path, f"services: {{a: {{command: {command}}}}}\n").config.services["a"].command == words


def test_load_env_and_args_keep_their_text(tmp_path: Path) -> None:
    text = "services:\n  a:\n    command: x\n    args: [1e3, 0x10]\n    env: {A: 012, B: true, C: 1.50, D: no, E: ''}\n"
    service = loaded(tmp_path, text).config.services["a"]
    assert service.env == {"A": "012", "B": "true", "C": "1.50", "D": "no", "E": ""}
    assert service.args == ("1e3", "0x10")


def test_load_options_keep_their_types(tmp_path: Path) -> None:
    text = "instances: {o: {engine: ollama, options: {args: [1, true], env: {x: 1.5}, n: 012, z: null}}}\n"
    assert loaded(tmp_path, text).config.instances["o"].options == {
        "args": [1, True],
        "env": {"x": 1.5},
        "n": 12,
        "z": None,
    }


def test_load_empty_value_means_the_default(tmp_path: Path) -> None:
    text = "services:\n  a:\n    command: x\n    stop:\n    port:\n    restart: {backoff: }\ninstances:\nmodels: ~\n"
    service = loaded(tmp_path, text).config.services["a"]
    assert (service.stop.timeout, service.port, service.restart.backoff.max) == (10, None, 60)


def test_load_variables_become_numbers_sizes_and_flags(tmp_path: Path) -> None:
    text = (
        "services:\n  a:\n    command: ['${BIN:-node}', '$$HOME']\n    port: ${PORT}\n    enabled: ${ON}\n"
        "    max_age: ${AGE}\n    limits: {memory: '${MEM}'}\n    env: {A: 'x-${PORT}-y', B: '${EMPTY:-d}', C: '${EMPTY-d}'}\n"
    )
    env = {"PORT": "3000", "ON": "true", "AGE": "24h", "MEM": "2GiB", "EMPTY": ""}
    service = loaded(tmp_path, text, env).config.services["a"]
    assert (service.command, service.port, service.enabled) == (("node", "$HOME"), 3000, True)
    assert (service.max_age, service.limits.memory) == (86400, 2**31)
    assert service.env == {"A": "x-3000-y", "B": "d", "C": ""}


@pytest.mark.parametrize(
    ("text", "result"),
    [
        ("$", "$"), ("$$", "$"), ("$$$$", "$$"), ("$x", "$x"), ("a$", "a$"), ("$${A}", "${A}"), ("${A}", "1"), ("${A}${A}", "11"),
        ("${N:-x}", "x"), ("${N:-}", ""), ("${E:-x}", "x"), ("${E-x}", ""), ("${A:-x}", "1"), ("${A:?m}", "1"), ("${N:-${A}}", "1"),
        ("${N:-${M:-b}}", "b"), ("${A:-${N}}", "1"), ("${N:-a$$b}", "a$b"), ("${V}", "${A}"), ("{A}", "{A}"), ("}", "}"),
        ("${N:-}}", "}"), ("${N-x}", "x"), ("${E?m}", ""),
    ],
)  # fmt: skip
def test_interpolate_replaces_variables(text: str, result: str) -> None:
    assert interpolate(text, {"A": "1", "E": "", "V": "${A}"}) == result


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("${N}", "the variable 'N' is not set (set it, or write ${N:-default})"),
        ("${port}", "the variable 'port' is not set (for the process's own, write {port})"),
        ("${N:?give it}", "the variable 'N' is not set: give it"),
        ("${E:?give it}", "the variable 'E' is not set: give it"),
        ("${N:?}", "the variable 'N' is not set: it is required"),
        ("${N:?${A} first}", "the variable 'N' is not set: 1 first"),
        ("${", "'${' must be followed by the name of a variable (write $${ for a plain '${')"),
        ("${1}", "'${' must be followed by the name of a variable (write $${ for a plain '${')"),
        ("${A", "'${' is not closed by '}' (write $${ for a plain '${')"),
        ("${A:-x", "'${' is not closed by '}' (write $${ for a plain '${')"),
        ("${N:-x", "'${' is not closed by '}' (write $${ for a plain '${')"),
        ("${A!}", "'${A' must be followed by '}', ':-default' or ':?message'"),
        ("${N:-" * 20 + "}" * 20, "variables are nested more than 8 levels deep"),
    ],
)
def test_interpolate_invalid_text_raises(text: str, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        interpolate(text, {"A": "1", "E": ""})
    assert str(caught.value) == message


@given(st.text(max_size=50))
def test_interpolate_doubled_dollars_give_any_text(text: str) -> None:
    assert interpolate(text.replace("$", "$$"), {}) == text


@given(st.text(max_size=30), st.text(alphabet=st.characters(exclude_characters="$"), max_size=20))
def test_interpolate_value_is_not_interpolated_again(value: str, around: str) -> None:
    assert interpolate(f"{around}${{A}}{around}", {"A": value}) == around + value + around


@given(st.text(alphabet=st.sampled_from(list("${}:-?ABN x")), max_size=30))
def test_interpolate_error_never_contains_a_value(text: str) -> None:
    message = ""
    try:
        assert isinstance(interpolate(text, {"A": "secret-value"}), str)
    except ValueError as error:
        message = str(error)
    assert "\n" not in message
    assert "secret-value" not in message or ":?" in text or "?" in text


def test_include_is_relative_to_its_file_and_read_once(tmp_path: Path) -> None:
    (tmp_path / "models.d" / "more").mkdir(parents=True)
    (tmp_path / "models.d" / "a.yaml").write_text("version: 1\ninclude: more/*.yaml\nmodels: {a: {engine: vllm}}\n")
    (tmp_path / "models.d" / "b.yaml").write_text("models: {b: {engine: vllm, cwd: here}}\ngateway: {max_body: 1MiB}\n")
    (tmp_path / "models.d" / "more" / "c.yaml").write_text("models: {c: {engine: vllm}}\n")
    text = "include: ['models.d/*.yaml', models.d/b.yaml, 'none/*.yaml']\ngateway: {insecure: true}\nmodels:\n"
    result = loaded(tmp_path, text)
    assert set(result.config.models) == {"a", "b", "c"}
    assert result.config.gateway.max_body == 2**20
    assert result.config.gateway.insecure
    assert [path.relative_to(tmp_path).as_posix() for path in result.files] == [
        "fleet.yaml", "models.d/a.yaml", "models.d/more/c.yaml", "models.d/b.yaml",
    ]  # fmt: skip
    assert result.folder_of(("models", "b", "cwd")) == tmp_path / "models.d"
    assert result.resolve(("models", "b", "cwd"), "../x") == tmp_path / "x"
    assert result.folder_of(("services", "nobody")) == tmp_path


def refused(folder: Path, text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        loaded(folder, text)
    return [
        f"{Path(one.file).name}:{one.line}:{one.column}: {one.path}: {one.message}" for one in caught.value.problems
    ]


def test_include_duplicate_key_names_both_places(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("models:\n  m: {engine: vllm}\nname: x\ngateway: {queue: {max: 1}}\n")
    text = "include: a.yaml\nname: y\nmodels: {m: {engine: vllm}}\ngateway: {queue: {max: 2}}\n"
    first = tmp_path / "fleet.yaml"
    assert refused(tmp_path, text) == [
        f"a.yaml:2:3: models.m: is defined twice: first at {first}:3:10",
        f"a.yaml:3:1: name: is defined twice: first at {first}:2:1",
        f"a.yaml:4:19: gateway.queue.max: is defined twice: first at {first}:4:19",
    ]


def test_include_cycle_is_rejected(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("include: b.yaml\n")
    (tmp_path / "b.yaml").write_text("include: fleet.yaml\n")
    assert refused(tmp_path, "include: a.yaml\n") == [
        "b.yaml:1:10: include: a file includes itself: fleet.yaml → a.yaml → b.yaml → fleet.yaml"
    ]


def test_defaults_are_merged_under_every_entry(tmp_path: Path) -> None:
    text = """
defaults:
  process:
    restart: {policy: on-failure, backoff: {initial: 1s, max: 9s}}
    env: {A: '1', B: '1'}
    logs: {keep: 9}
    probes: {readiness: {http: /health, period: 7s}}
  model: {ttl: 3m, memory: {host: 1GiB}, queue: {max: 9, timeout: 9s}}
services:
  a: {command: x, restart: {backoff: {initial: 2s}}, env: {B: '2'}, probes: {readiness: {tcp: true}}}
instances:
  o: {engine: ollama, logs: {keep: 1}}
  far: {engine: lmstudio, external: 'http://h:1'}
models:
  held: {instance: o, memory: {gpu0: 1GiB}}
  own: {engine: vllm, queue: {max: 1}}
  name: {route: [{to: own}]}
"""
    result = loaded(tmp_path, text)
    config = result.config
    a, o, own = config.services["a"], config.instances["o"], config.models["own"]
    assert (a.restart.policy, a.restart.backoff.initial, a.restart.backoff.max) == ("on-failure", 2, 9)
    assert a.env == {"A": "1", "B": "2"}
    assert a.probes.readiness is not None
    assert (a.probes.readiness.ways, a.probes.readiness.period) == (("tcp",), 7)
    assert (o.logs.keep, o.restart.backoff.initial) == (1, 1)
    assert config.instances["far"].env == {}
    held = config.models["held"]
    assert isinstance(held, HeldModel)
    assert isinstance(own, EngineModel)
    assert (held.ttl, held.memory) == (180, {"gpu0": 2**30})
    assert (own.ttl, own.queue.max, own.queue.timeout, own.restart.policy) == (180, 1, 9, "on-failure")
    inherited = result.source_map.problem(("services", "a", "logs", "keep"), "x")
    assert (inherited.line, inherited.column) == (6, 18)


def test_source_map_unknown_path_gives_nearest_parent(tmp_path: Path) -> None:
    result = loaded(tmp_path, "models:\n  m:\n    engine: vllm\n    options: {model: x}\n")
    place = result.source_map.problem(("models", "m", "options", "model"), "wrong")
    assert (place.line, place.column, place.path, place.excerpt) == (
        4,
        22,
        "models.m.options.model",
        "    options: {model: x}",
    )
    missing = result.source_map.problem(("models", "m", "options", "tensor", 0), "wrong")
    assert (missing.line, missing.column, missing.path) == (4, 5, "models.m.options.tensor[0]")
    assert result.source_map.problem((), "wrong").line == 1


def test_config_hash_depends_on_meaning_not_layout(tmp_path: Path) -> None:
    one = loaded(tmp_path, "models: {m: {engine: vllm, ttl: 5m}}\nname: x\n").config_hash
    same = loaded(tmp_path, "# a comment\nname: 'x'\nmodels:\n  m:\n    ttl: 5m\n    engine: vllm\n").config_hash
    other = loaded(tmp_path, "models: {m: {engine: vllm, ttl: 6m}}\nname: x\n").config_hash
    assert one == same
    assert one != other


def test_process_names_of_replicas() -> None:
    assert process_names("a", 1) == ("a",)
    assert process_names("a", 3) == ("a-1", "a-2", "a-3")
    assert path_text(("models", "chat", "route", 0, "to")) == "models.chat.route[0].to"


def test_load_five_thousand_models_is_quick(tmp_path: Path) -> None:
    text = "instances: {o: {engine: ollama}}\ndefaults: {model: {ttl: 5m}, process: {logs: {keep: 3}}}\nmodels:\n" + "".join(
        f"  m{i}:\n    instance: o\n    served_as: x{i}\n    from: /models/{i}.gguf\n    memory: 8GiB\n    aliases: [a{i}, b{i}]\n"
        f"    queue: {{max: 10, timeout: 1m}}\n    fallback: [m0]\n" if i else "  m0: {engine: vllm}\n" for i in range(5000)
    )  # fmt: skip
    start = time.process_time()
    result = loaded(tmp_path, text)
    assert time.process_time() - start < 2 * slowdown()
    assert len(result.config.models) == 5000
