"""Imports from llama-swap: the result, the report, and that the result loads and does what llama-swap did."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from fleetd.config.importers.llama_server import SWITCHES, VALUED
from fleetd.config.importers.llama_swap.files import import_llama_swap
from fleetd.config.importers.report import Imported
from fleetd.config.schema.model import EngineModel
from fleetd.engines.llamacpp.options import LlamaCppOptions
from fleetd.engines.llamacpp.server_main import SPELLINGS
from fleetd.engines.llamacpp.validate import OWNED
from fleetd.errors import ConfigError
from tests.unit.config.test_import_models import loads


def imported(text: str, **options: Any) -> Imported:
    return import_llama_swap(textwrap.dedent(text), **options)


def model(folder: Path, text: str, name: str = "a", env: dict[str, str] | None = None, **options: Any) -> EngineModel:
    found = loads(imported(text, **options), folder, env).config.models[name]
    assert isinstance(found, EngineModel)
    return found


def told(result: Imported, outcome: str) -> str:
    return "\n".join(str(entry) for entry in result.report.entries if entry.outcome == outcome)


LLAMA_SWAP = """
healthCheckTimeout: 400
globalTTL: 600
logLevel: debug
apiKeys: [sk-very-secret]
macros:
  server: /opt/llama-server --port ${PORT}
  dir: /models
models:
  "org/qwen:7b":
    name: Qwen
    description: the small one
    cmd: |
      ${server}
      # the model
      --model ${dir}/q.gguf \\
      -c 16384 -np 2 -ngl 99 --alias ${MODEL_ID} --cpu-moe -ot "a=CPU"
    env: ["CUDA_VISIBLE_DEVICES=1", "TOKEN=${env.HF_TOKEN}", "no value"]
    aliases: [gpt-4o-mini]
    ttl: 0
    concurrencyLimit: 3
    useModelName: qwen
    filters: {stripParams: "temperature, model", setParamsByID: {"${MODEL_ID}:high": {effort: high}}}
    metadata: {a: 1}
    wild: 1
  fixed:
    cmd: python -m server --price '$5'
    proxy: http://127.0.0.1:9999
    checkEndpoint: none
    cmdStop: docker stop fixed
  far:
    proxy: http://10.0.0.5:8080/
groups: {g: {members: [fixed], persistent: true, swap: false}}
hooks: {on_startup: {preload: [fixed, gpt-4o-mini, missing]}}
"""


def test_llama_swap_file_becomes_models_that_load(tmp_path: Path) -> None:
    result = import_llama_swap(LLAMA_SWAP)
    config = loads(result, tmp_path, {"HF_TOKEN": "h$f"}).config
    assert list(config.models) == ["org-qwen-7b", "fixed", "far"]
    qwen, fixed, far = (one for one in config.models.values() if isinstance(one, EngineModel))
    assert (qwen.engine, qwen.command, qwen.device, qwen.preload) == ("llamacpp", ("/opt/llama-server",), "gpu1", True)
    assert qwen.options == {
        "model": "/models/q.gguf", "gpu_layers": 99, "parallel": 2, "context_length": 8192,
        "extra_args": ["--cpu-moe", "-ot", "a=CPU"],
    }  # fmt: skip
    assert qwen.env == {"CUDA_VISIBLE_DEVICES": "1", "TOKEN": "h$f"}
    assert (qwen.ttl, qwen.concurrency, qwen.served_as) == (0, 3, "qwen")
    assert qwen.aliases == ("org/qwen:7b", "gpt-4o-mini", "org/qwen:7b:high")
    assert qwen.probes.startup is not None
    assert (qwen.probes.startup.http, qwen.probes.startup.deadline) == ("/health", 400)
    assert (qwen.load_timeout, qwen.queue.timeout) == (400, 400)
    assert fixed.command == ("python", "-m", "server", "--price", "$5")
    assert (fixed.port, fixed.ttl, fixed.preload, fixed.pin, fixed.concurrency) == (9999, 600, True, True, 10)
    assert fixed.stop.command == ("docker", "stop", "fixed")
    assert fixed.probes.startup is not None
    assert fixed.probes.startup.ways == ("tcp",)
    assert (far.external, far.command) == ("http://10.0.0.5:8080", None)
    assert "# Qwen\n  # the small one\n  org-qwen-7b:" in result.text


def test_llama_swap_report_names_what_is_lost() -> None:
    result = import_llama_swap(LLAMA_SWAP)
    refused = told(result, "refused")
    assert "org/qwen:7b.wild: not understood" in refused
    assert "temperature" in refused
    assert "requests for org/qwen:7b:high reach the model without effort" in refused
    assert "models.*.metadata: models carry no metadata (1 of 3 models)" in refused
    assert "'no value' is not NAME=value" in refused
    assert "hooks.on_startup.preload.missing: no model has this name" in refused
    assert "apiKeys" in refused
    assert "sk-very-secret" not in "\n".join(result.report.lines())


@pytest.mark.parametrize(
    "text", ["a: 1\n", "models: []\n", "models:\n", "- a\n", "a: [\n", "", "models: {x: 1, x: 2}\n"]
)
def test_llama_swap_file_without_models_is_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_llama_swap(text)
    assert caught.value.problems


def test_macros_that_double_are_refused() -> None:
    macros = "\n".join(f'  m{n}: "${{m{n - 1}}}${{m{n - 1}}}"' for n in range(1, 60))
    with pytest.raises(ConfigError, match="exceeds 1 MiB"):
        import_llama_swap(f"macros:\n  m0: {'x' * 100}\n{macros}\nmodels: {{a: {{cmd: 'srv ${{m59}}'}}}}\n")


@pytest.mark.parametrize(
    ("cmd", "words"),
    [
        ("# ${base} is above\n${base}\n--model a.gguf", "srv --port {port} --model a.gguf"),
        ("srv --port ${PORT} \\\n  # -c 4096 \\\n  -c 8192 \\\n  --jinja", "srv --port {port} -c 8192 --jinja"),
        ("srv --port ${PORT} -m /m/C#/a.gguf -c 1", "srv --port {port} -m /m/C#/a.gguf -c 1"),
        ("srv --port ${PORT} # no comment", "srv --port {port} # no comment"),
        ("${hidden}\n--port ${PORT}", "srv --port {port}"),
        ("srv --port ${PORT} -x 'not closed", "srv --port {port} -x not closed"),
        ("srv ${level} ${inner}", "srv 7 true-0.5"),
    ],
)
def test_commands_are_split_as_llama_swap_does(cmd: str, words: str, tmp_path: Path) -> None:
    text = "macros:\n  base: >\n    srv --port ${PORT}\n  hidden: |\n    # gone\n    srv\n  on: true\n  half: 0.5\n"
    text += '  inner: "${on}-${half}"\n  level: 7\nmodels:\n  a:\n    cmd: |\n' + textwrap.indent(cmd, " " * 6)
    assert " ".join(model(tmp_path, text).command or ()) == words


def test_macros_are_replaced_in_every_field(tmp_path: Path) -> None:
    text = """
    macros: {idle: 300, repo: org/repo, path: /v1/models, slots: 4, wait: 33, far: 12}
    unloadTimeout: ${wait}
    routing: {scheduler: {settings: {fifo: {priority: {a-chat: "${far}"}}}}}
    models:
      a:
        macros: {repo: own/repo, tail: "${repo}-x"}
        cmd: srv --port ${PORT}
        ttl: ${idle}
        useModelName: ${tail}
        checkEndpoint: ${path}
        concurrencyLimit: ${slots}
        aliases: ["${MODEL_ID}-chat"]
        env: ["PLACE=${env.PLACE}/${PORT}"]
    """
    found = model(tmp_path, text, env={"PLACE": "/p"})
    assert (found.ttl, found.served_as, found.aliases, found.concurrency) == (300, "own/repo-x", ("a-chat",), 4)
    assert found.probes.startup is not None
    assert found.probes.startup.http == "/v1/models"
    assert (found.stop.timeout, found.priority, found.env) == (33, 12, {"PLACE": "/p/{port}"})


def test_unknown_macros_are_named() -> None:
    assert "the macro ${nope} is not defined" in told(imported("models: {a: {cmd: 'srv ${nope}'}}"), "warning")


@pytest.mark.parametrize(
    ("first", "second", "words"),
    [
        ("srv --port 9000 -m a", "srv --port=9000 -m b", "srv --port {port} -m a"),
        ("srv --listen 0.0.0.0:9000", "srv -p 9000:8080 x", "srv --listen 0.0.0.0:{port}"),
        ("docker run -p 9000:8000 i --seed 9000", "srv --http-port 9000", "docker run -p {port}:8000 i --seed 9000"),
    ],
)
def test_one_port_of_many_models_is_assigned(first: str, second: str, words: str, tmp_path: Path) -> None:
    proxy = "proxy: http://127.0.0.1:9000"
    text = f'models: {{a: {{cmd: "{first}", {proxy}}}, b: {{cmd: "{second}", {proxy}}}}}'
    found = model(tmp_path, text)
    assert (found.port, " ".join(found.command or ())) == (None, words)
    assert "{port}" in " ".join(model(tmp_path, text, "b").command or ())


def test_port_that_no_word_states_is_reported(tmp_path: Path) -> None:
    text = 'models: {a: {cmd: srv, proxy: "http://localhost:81"}, b: {cmd: srv, proxy: "http://localhost:81"}}'
    assert model(tmp_path, text).port is None
    assert "a.proxy: port 81 is also another's, and the command does not state it" in told(imported(text), "warning")
    assert model(tmp_path, "models: {a: {cmd: 'srv --port 8484', proxy: 'http://[::1]:8484'}}").port is None


@pytest.mark.parametrize(
    ("proxy", "port", "external"),
    [
        ("http://0.0.0.0:9100", 9100, None),
        ("http://[::]:9100", 9100, None),
        ("http://127.0.1.1:9100/", 9100, None),
        ("localhost:9100", 9100, None),
        ("http://10.0.0.5:8000/v1/", None, "http://10.0.0.5:8000"),
        ("http://10.0.0.5:8000/api/v1", None, "http://10.0.0.5:8000/api"),
        ("http://10.0.0.5:8000/v10", None, "http://10.0.0.5:8000/v10"),
        ("http://${env.FAR}:8000/v1", None, "http://far:8000"),
    ],
)
def test_proxy_is_a_port_here_or_another_server(
    proxy: str, port: int | None, external: str | None, tmp_path: Path
) -> None:
    found = model(tmp_path, f'models: {{a: {{cmd: srv --port 9100, proxy: "{proxy}"}}}}', env={"FAR": "far"})
    assert (found.port, found.external) == (port, external)
    assert (found.command is None) == (external is not None)


def test_names_that_fleetd_cannot_have_are_replaced(tmp_path: Path) -> None:
    text = """
    models:
      GPT OSS 20B: {cmd: "srv --port ${PORT}", aliases: [gpt 4, b, "é"]}
      GPT-OSS-20B: {cmd: "srv --port ${PORT}", aliases: ["GPT OSS 20B", gpt-4]}
      all: {cmd: "srv --port ${PORT}"}
      b: {cmd: "srv --port ${PORT}"}
    """
    config = loads(imported(text), tmp_path).config
    assert list(config.models) == ["GPT-OSS-20B", "GPT-OSS-20B-2", "all-model", "b"]
    first, second = config.models["GPT-OSS-20B"], config.models["all-model"]
    assert isinstance(first, EngineModel)
    assert isinstance(second, EngineModel)
    assert (first.served_as, first.aliases) == ("GPT OSS 20B", ("gpt-4",))
    assert (second.served_as, second.aliases) == ("all", ("all",))
    assert "'gpt 4' is no name in fleetd: request gpt-4" in told(imported(text), "warning")
    assert "aliases: b is the name of another model" in told(imported(text), "refused")


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ("docker stop vllm-${PORT}", ("SIGTERM", ("docker", "stop", "vllm-{port}"))),
        ("kill -9 ${PID}", ("SIGKILL", None)),
        ("kill -INT ${PID}", ("SIGINT", None)),
        ("kill -s QUIT ${PID}", ("SIGQUIT", None)),
        ("pkill -P ${PID}", ("SIGTERM", None)),
    ],
)
def test_stop_command_keeps_port_and_signal(stop: str, expected: tuple[Any, ...], tmp_path: Path) -> None:
    found = model(tmp_path, f'models: {{a: {{cmd: "srv --port ${{PORT}}", cmdStop: "{stop}"}}}}').stop
    assert (found.signal, found.command) == expected


def test_unload_timeout_of_model_or_file_is_kept(tmp_path: Path) -> None:
    text = (
        "unloadTimeout: 60\nmodels: {a: {cmd: srv, unloadTimeout: 45}, b: {cmd: srv}, c: {cmd: srv, unloadTimeout: 10}}"
    )
    assert [model(tmp_path, text, name).stop.timeout for name in "abc"] == [45, 60, 10]


def test_routing_becomes_pin_and_priority(tmp_path: Path) -> None:
    text = """
    models: {a: {cmd: s}, b: {cmd: s, aliases: [bee]}, c: {cmd: s}, d: {cmd: s}}
    routing:
      router: {use: group, settings: {groups: {one: {persistent: true, swap: false, members: [a]},
                                               two: {persistent: true, members: [c, d]}}}}
      scheduler: {use: fifo, settings: {fifo: {priority: {bee: 5000, gone: 1}}}}
    """
    found = [model(tmp_path, text, name) for name in "abcd"]
    assert [(one.pin, one.priority) for one in found] == [(True, 0), (False, 1000), (False, 100), (False, 100)]
    warning = told(imported(text), "warning")
    assert "runs one model at a time" in warning
    assert "the memory of b, c, d: they stay" in warning


def test_priority_beyond_the_limit_is_reported() -> None:
    text = "models: {a: {cmd: s}}\nrouting: {scheduler: {settings: {fifo: {priority: {a: -5000}}}}}"
    assert "a.priority: -5000 is beyond fleetd's limit: -1000" in told(imported(text), "approximated")


def test_models_with_a_known_size_are_not_warned_about() -> None:
    text = "models: {a: {cmd: llama-server -m a.gguf -c 512}, b: {cmd: llama-server -m b.gguf -c 512}}"
    assert "one model at a time" not in told(imported(text), "warning")


def test_peers_and_selectors_become_servers_and_routes(tmp_path: Path) -> None:
    text = """
    models: {a: {cmd: s}, b: {cmd: s}}
    peers:
      near: {proxy: "http://10.0.0.2/v1", models: [m/x, a]}
      shop: {proxy: "https://api.example", apiKey: "${env.KEY}", models: [m/y]}
    selectors: {plan: {strategy: pin, targets: [a, b]}, "warm one": {strategy: warm, targets: [b, a]}, none: {targets: [q]}}
    """
    config = loads(imported(text), tmp_path, {"KEY": "k"}).config
    assert config.instances["near"].external == "http://10.0.0.2"
    assert config.instances["shop"].options == {"api_key": "k"}
    assert {name: getattr(one, "aliases", ()) for name, one in config.models.items()} == {
        "a": (), "b": (), "near-m-x": ("near/m/x", "m/x"), "near-a": ("near/a",), "shop-m-y": ("shop/m/y", "m/y"),
        "plan": (), "warm-one": (),
    }  # fmt: skip


def test_files_of_a_folder_are_merged(tmp_path: Path) -> None:
    more = [("b.yaml", "models: {b: {cmd: srv}}\nhooks: {on_startup: {preload: [b]}}"), ("c.yaml", "# empty")]
    found = loads(imported("globalTTL: 5\nmodels: {a: {cmd: srv}}", more=more), tmp_path).config.models
    assert list(found) == ["a", "b"]
    for other, message in (("models: {a: {cmd: x}}", "in another file too"), ("globalTTL: 6", "different value")):
        with pytest.raises(ConfigError, match=message):
            imported("globalTTL: 5\nmodels: {a: {cmd: srv}}", more=[("b.yaml", other)])


@pytest.mark.parametrize(
    ("flags", "options"),
    [
        ("-c 8192", {"context_length": 8192}),
        ("-c 0", {"context_length": 4000}),
        ("", {"context_length": 4000}),
        ("-c 9000 -np 4", {"parallel": 4, "context_length": 2250}),
        ("--ctx-size=10 --n-gpu-layers all -fa", {"context_length": 10, "gpu_layers": 999, "flash_attention": True}),
        ("-c 9 -ngl -1 -fa off -t -1 -s -1", {"context_length": 9, "flash_attention": False}),
        (
            "-c 9 -ts 3,1 -sm row -mg 1",
            {"context_length": 9, "tensor_split": [3, 1], "split_mode": "row", "main_gpu": 1},
        ),
        ("-c 9 --no-mmap --mlock --jinja", {"context_length": 9, "mmap": False, "mlock": True, "jinja": True}),
        ("-c 9 --lora x --lora-scaled y 0.5", {"context_length": 9, "lora": ["x", {"path": "y", "scale": 0.5}]}),
        ("-c 9 -cram 512 --api-key k", {"context_length": 9, "cache_ram": "512MiB", "api_key": "k"}),
        ("-c 9 --no-webui --metrics --temp 0.6", {"context_length": 9, "extra_args": ["--temp", "0.6"]}),
        (
            """-c 9 --chat-template-kwargs '{"a":{"b":1}}'""",
            {"context_length": 9, "extra_args": ["--chat-template-kwargs", '{"a":{"b":1}}']},
        ),
    ],
)
def test_llama_server_flags_become_typed_options(flags: str, options: dict[str, Any], tmp_path: Path) -> None:
    text = f"models:\n  a:\n    cmd: |\n      llama-server -m a.gguf --port ${{PORT}} {flags}\n"
    found = model(tmp_path, text, trained_context=lambda _: 4000)
    assert (found.engine, found.options) == ("llamacpp", {"model": "a.gguf", **options})
    LlamaCppOptions(**found.options)


@pytest.mark.parametrize(
    ("cmd", "why"),
    [
        ("llama-server -hf org/repo --port ${PORT}", "downloads its model"),
        ("llama-server --port ${PORT}", "names no model file"),
        ("llama-server -m a.gguf -c many", "-c 'many' has no equal"),
        ("llama-server -m a.gguf --ssl-key-file k", "serves TLS"),
        ("llama-server -m a.gguf --rpc 127.0.0.1:${PORT}", "has ${PORT} in another flag than --port"),
        ("llama-server -m", "-m has no value"),
    ],
)
def test_llama_server_command_that_stays_one(cmd: str, why: str, tmp_path: Path) -> None:
    text = f'models: {{a: {{cmd: "{cmd}"}}}}'
    assert model(tmp_path, text).engine == "process"
    assert f"stays a command of the engine process: it {why}" in told(imported(text), "warning")


def test_wrappers_and_variables_of_llama_server_are_read(tmp_path: Path) -> None:
    text = """
    models:
      a:
        cmd: numactl -N 0 /opt/llama-server-vulkan --port ${PORT} -c 100
        env: [LLAMA_ARG_MODEL=/m/a.gguf, LLAMA_ARG_CTX_SIZE=7, LLAMA_ARG_JINJA=1, LLAMA_API_KEY=k, LLAMA_CACHE=/c]
    """
    found = model(tmp_path, text)
    assert found.command == ("numactl", "-N", "0", "/opt/llama-server-vulkan")
    assert found.options == {"model": "/m/a.gguf", "context_length": 100, "jinja": True, "api_key": "k"}
    assert found.env == {"LLAMA_CACHE": "/c"}
    assert model(tmp_path, "models: {a: {cmd: docker run i llama-server -m a.gguf}}").engine == "process"


def test_flag_table_covers_what_the_engine_owns() -> None:
    known = {*VALUED, *SWITCHES}
    assert set(OWNED) <= known
    assert {short for short, flag in SPELLINGS.items() if flag in OWNED} <= known
    options = {
        option for option in VALUED.values() if option not in ("host", "port", "alias", "context", "lora-scaled")
    }
    assert options <= set(LlamaCppOptions.model_fields)


def test_literal_braces_of_a_command_stay_text(tmp_path: Path) -> None:
    text = """
    models:
      a: {cmd: "srv --port ${PORT} --path /x/{name} --json '{\\"name\\": 1}'", env: ["A={port}"], cmdStop: "stop {host} ${PORT}"}
      b: {cmd: "llama-server -m b.gguf -c 9 --x {name}"}
    """
    found = model(tmp_path, text)
    assert found.command == ("srv", "--port", "{port}", "--path", "/x/{{name}}", "--json", '{"name": 1}')
    assert (found.env, found.stop.command) == ({"A": "{{port}}"}, ("stop", "{{host}}", "{port}"))
    assert model(tmp_path, text, "b").options["extra_args"] == ["--x", "{name}"]
