"""Imports from llama-swap and Ollama: the result, the report, and that the result loads."""

from __future__ import annotations

from pathlib import Path

import pytest

from fleetd.config.importers.llama_swap import import_llama_swap
from fleetd.config.importers.ollama import import_ollama
from fleetd.config.importers.report import Imported
from fleetd.config.load import LoadedConfig, load
from fleetd.config.schema.model import EngineModel
from fleetd.errors import ConfigError

LLAMA_SWAP = """
healthCheckTimeout: 300
globalTTL: 600
logLevel: debug
macros:
  server: /opt/llama-server --port ${PORT}
  dir: /models
models:
  "org/qwen:7b":
    cmd: |
      ${server}
      # the model
      --model ${dir}/q.gguf \\
      --alias ${MODEL_ID}
    env: ["CUDA_VISIBLE_DEVICES=0", "TOKEN=${env.HF_TOKEN}"]
    aliases: [gpt-4o-mini]
    ttl: 0
    concurrencyLimit: 3
    useModelName: qwen
    filters: {stripParams: temperature}
    wild: 1
  fixed:
    cmd: python -m server --price '$5'
    proxy: http://127.0.0.1:9999
    checkEndpoint: none
    cmdStop: docker stop fixed
  far:
    proxy: http://10.0.0.5:8080/
groups: {g: {members: [fixed]}}
hooks: {on_startup: {preload: [fixed, missing]}}
"""


def loads(imported: Imported, folder: Path, env: dict[str, str] | None = None) -> LoadedConfig:
    path = folder / "fleet.yaml"
    path.write_text(imported.text, encoding="utf-8")
    return load(path, env or {})


def said(imported: Imported) -> dict[tuple[str, str], str]:
    return {(f"{one.subject}:{one.field}", str(one.outcome)): one.detail for one in imported.report.entries}


@pytest.mark.parametrize(
    ("proxy", "external"),
    [
        ("http://10.0.0.5:8000/v1", "http://10.0.0.5:8000"),
        ("http://10.0.0.5:8000/v1/", "http://10.0.0.5:8000"),
        ("http://10.0.0.5:8000/api/v1", "http://10.0.0.5:8000/api"),
        ("http://10.0.0.5:8000/v10", "http://10.0.0.5:8000/v10"),
        ("http://${env.FAR}:8000/v1", "http://far:8000"),
    ],
)
def test_the_address_of_another_machine_is_one_that_loads(proxy: str, external: str, tmp_path: Path) -> None:
    imported = import_llama_swap(f'models: {{a: {{proxy: "{proxy}"}}}}')
    far = loads(imported, tmp_path, {"FAR": "far"}).config.models["a"]
    assert isinstance(far, EngineModel)
    assert far.external == external


def test_a_llama_swap_configuration_becomes_models_that_load(tmp_path: Path) -> None:
    imported = import_llama_swap(LLAMA_SWAP)
    config = loads(imported, tmp_path, {"HF_TOKEN": "h$f"}).config
    assert list(config.models) == ["org-qwen-7b", "fixed", "far"]
    qwen, fixed, far = (model for model in config.models.values() if isinstance(model, EngineModel))
    words = ("/opt/llama-server", "--port", "{port}", "--model", "/models/q.gguf", "--alias", "org/qwen:7b")
    assert (qwen.engine, qwen.command) == ("process", words)
    assert qwen.env == {"CUDA_VISIBLE_DEVICES": "0", "TOKEN": "h$f"}
    assert (qwen.aliases, qwen.ttl, qwen.concurrency, qwen.served_as) == (("org/qwen:7b", "gpt-4o-mini"), 0, 3, "qwen")
    assert qwen.probes.startup is not None
    assert (qwen.probes.startup.http, qwen.probes.startup.deadline) == ("/health", 300)
    assert fixed.command == ("python", "-m", "server", "--price", "$5")
    assert (fixed.port, fixed.ttl, fixed.preload, fixed.stop.command) == (9999, 600, True, ("docker", "stop", "fixed"))
    assert fixed.probes.startup is not None
    assert fixed.probes.startup.ways == ("tcp",)
    assert (far.external, far.command) == ("http://10.0.0.5:8080", None)
    report = said(imported)
    assert "engine: llamacpp" in report["org/qwen:7b:cmd", "warning"]
    assert report["org/qwen:7b:wild", "refused"] == "not understood"
    assert ("org/qwen:7b:filters", "refused") in report
    assert "bytes" in report[":groups", "refused"]
    assert "say memory" in report["fixed:memory", "warning"]


@pytest.mark.parametrize(
    "text", ["a: 1\n", "models: []\n", "models:\n", "- a\n", "a: [\n", "", "models: {x: 1, x: 2}\n"]
)
def test_llama_swap_files_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        import_llama_swap(text)
    assert caught.value.problems


TABLE = """NAME                       ID              SIZE      MODIFIED
llama3.2:latest            a80c4f17acd5    2.0 GB    3 days ago
tsc-ulysses:q8_0           b80c4f17acd5    8.5 GB    4 weeks ago
gpt-oss:120b-cloud         c80c4f17acd5    -         4 weeks ago
"""
TAGS = """{"models": [{"name": "llama3.2:latest", "size": 1, "details": {"families": ["llama"]}},
 {"name": "nomic-embed-text:v1.5", "details": {"families": ["nomic-bert"]}}, {"name": "far:1", "remote_host": "https://x", "details": {}},
 {"name": "bad name", "details": {}}, {"name": "llama3.2", "details": {}}, 7]}"""


def test_what_ollama_lists_becomes_models(tmp_path: Path) -> None:
    imported = import_ollama(TABLE)
    assert imported.data == {
        "version": 1,
        "instances": {"ollama": {"engine": "ollama"}},
        "models": {
            "llama3.2": {"instance": "ollama", "served_as": "llama3.2:latest"},
            "tsc-ulysses:q8_0": {"instance": "ollama"},
        },
    }
    assert "left out" in said(imported)["gpt-oss:120b-cloud:", "refused"]
    assert list(loads(imported, tmp_path).config.models) == ["llama3.2", "tsc-ulysses:q8_0"]
    on_a_drive = import_ollama(TABLE, models_dir="/Volumes/BOWIE/ollama").data["instances"]["ollama"]
    assert on_a_drive == {
        "engine": "ollama",
        "options": {"models_dir": "/Volumes/BOWIE/ollama"},
        "requires": ["/Volumes/BOWIE"],
    }


def test_what_ollamas_api_tells_becomes_models() -> None:
    imported = import_ollama(TAGS, instance=["a", "b"])
    assert imported.data == {
        "version": 1,
        "models": {
            "llama3.2": {"instance": ["a", "b"], "served_as": "llama3.2:latest"},
            "nomic-embed-text:v1.5": {"instance": ["a", "b"], "embedding": True},
        },
    }


@pytest.mark.parametrize("text", ["", "hello\n", "{", "{}", "7", "[" * 50_000])
def test_lists_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        import_ollama(text)
