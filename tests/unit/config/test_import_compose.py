"""Imports of compose files: the result, the report, and that the result loads."""

from __future__ import annotations

import textwrap
from pathlib import Path
from typing import Any

import pytest

from fleetd.config.importers import vllm_server
from fleetd.config.importers.compose.files import import_compose
from fleetd.config.importers.report import Imported
from fleetd.config.importers.vllm_server import read_vllm
from fleetd.engines.vllm.options import REMOVED, VllmOptions
from fleetd.errors import ConfigError
from tests.unit.config.test_import_models import loads, said

STACK = """
services:
  ollama:
    image: ollama/ollama:${OLLAMA_TAG-latest}
    ports: ["11434:11434"]
    volumes: [ollama:/root/.ollama]
    environment: [OLLAMA_NUM_PARALLEL=4, HTTPS_PROXY]
    restart: unless-stopped
    deploy: {resources: {reservations: {devices: [{driver: nvidia, count: all, capabilities: [gpu]}]}}}
  webui:
    image: ghcr.io/open-webui/open-webui:main
    ports: ["${WEBUI_PORT-3000}:8080"]
    volumes: [webui:/app/backend/data]
    environment: {OLLAMA_BASE_URL: "http://ollama:11434", WEBUI_SECRET_KEY: "${SECRET_KEY}"}
    depends_on: {ollama: {condition: service_healthy}, gone: {condition: service_started}}
    restart: always
  vllm:
    image: vllm/vllm-openai:v0.33.0
    command: --model org/q --served-model-name qwen big --max-model-len 8192 --no-enable-prefix-caching --foo bar
    ports: ["8001:8000"]
    ipc: host
    volumes: ["~/.cache/huggingface:/hf"]
    environment: {HF_TOKEN: "${HF_TOKEN}"}
    runtime: nvidia
  llama:
    image: ghcr.io/ggml-org/llama.cpp:server
    command: ["-m", "/models/tiny.gguf", "-c", "4096", "--host", "0.0.0.0", "--port", "8080"]
    ports: ["127.0.0.1:8082:8080"]
    volumes: ["./models:/models:ro"]
  app:
    image: app
    command: run --cost $$5
    ports: [{published: "${APP}", target: 80}]
    env_file: app.env
    healthcheck: {test: ["CMD-SHELL", "curl -f http://localhost:80/ok || exit 1"], interval: 5s, retries: 2}
    stop_grace_period: 1m
    shm_size: 1gb
    cap_add: [SYS_NICE]
    profiles: [extra]
    sysctls: {a: 1}
  built: {build: .}
volumes: {ollama: {}, webui: {name: data}}
secrets: {}
"""


@pytest.fixture
def stack(tmp_path: Path) -> Imported:
    folder = tmp_path / "My Stack"
    folder.mkdir()
    (folder / ".env").write_text("APP=8090\nSECRET_KEY='hush'\n# x\n")
    return import_compose(STACK, shown=str(folder / "compose.yaml"))


def test_compose_engines_are_typed_and_contained(stack: Imported, tmp_path: Path) -> None:
    folder = tmp_path / "My Stack"
    loads(stack, tmp_path, {"HF_TOKEN": "t"})
    assert stack.data["instances"]["ollama"] == {
        "engine": "ollama", "port": 11434, "options": {"num_parallel": 4}, "env": {"HTTPS_PROXY": "${HTTPS_PROXY:-}"},
        "runtime": {"docker": {
            "image": "ollama/ollama:${OLLAMA_TAG-latest}", "gpus": ["all"], "mounts": ["mystack_ollama:/root/.ollama"],
        }},
    }  # fmt: skip
    vllm = stack.data["models"]["vllm"]
    assert vllm["options"] == {
        "model": "org/q", "max_model_len": 8192, "enable_prefix_caching": False, "extra_args": {"foo": "bar"},
    }  # fmt: skip
    assert (vllm["served_as"], vllm["aliases"], vllm["port"]) == ("qwen", ["qwen", "big"], 8001)
    assert vllm["env"] == {"HF_TOKEN": "${HF_TOKEN:-}"}
    assert vllm["runtime"]["docker"] == {
        "image": "vllm/vllm-openai:v0.33.0", "gpus": ["all"], "mounts": [f"{Path.home()}/.cache/huggingface:/hf"],
        "args": ["--ipc", "host"],
    }  # fmt: skip
    llama = stack.data["models"]["llama"]
    assert llama["options"] == {"model": f"{folder}/models/tiny.gguf", "context_length": 4096}
    assert (llama["port"], llama["start"], llama["preload"], llama["ttl"]) == (8082, "always", True, 0)


def test_compose_services_keep_image_and_ports(stack: Imported, tmp_path: Path) -> None:
    webui, app = stack.data["services"]["webui"], stack.data["services"]["app"]
    assert webui["env"] == {"OLLAMA_BASE_URL": "http://127.0.0.1:11434", "WEBUI_SECRET_KEY": "${SECRET_KEY:-}"}
    assert (webui["port"], webui["depends_on"]) == (3000, {"ollama": "ready"})
    assert webui["runtime"] == {
        "docker": {"image": "ghcr.io/open-webui/open-webui:main", "mounts": ["data:/app/backend/data"]}
    }
    assert app == {
        "args": ["run", "--cost", "$5"], "port": 8090, "env_file": [str(tmp_path / "My Stack" / "app.env")],
        "runtime": {"docker": {
            "image": "app", "args": ["--shm-size", "1gb", "--cap-add", "SYS_NICE"], "network": "bridge", "container_port": 80,
        }},
        "restart": {"policy": "never"}, "stop": {"timeout": "1m"}, "enabled": False,
        "probes": {"readiness": {"http": "/ok", "period": "5s", "failures": 2}},
    }  # fmt: skip


def test_compose_report_names_what_is_lost(stack: Imported) -> None:
    report = said(stack)
    assert "is built from a Dockerfile" in report["built:", "refused"]
    assert "gone is not imported" in report["webui:depends_on", "refused"]
    assert report["app:sysctls", "refused"] == "has no equivalent"
    assert report[":secrets", "refused"] == "has no equivalent"
    assert "set SECRET_KEY in fleetd's environment" in report[":.env", "warning"]
    assert "hush" not in stack.text + "\n".join(stack.report.lines())


@pytest.mark.parametrize(
    ("image", "section"),
    [
        ("ollama/ollama", "instances"),
        ("docker.io/ollama/ollama:0.33", "instances"),
        ("ghcr.io/ggml-org/llama.cpp:server-cuda", "services"),  # without a command: no model
        ("vllm/vllm-openai@sha256:0", "services"),
        ("my/ollama-webui", "services"),
    ],
)
def test_image_decides_the_section(image: str, section: str, tmp_path: Path) -> None:
    imported = import_compose(f'services: {{a: {{image: "{image}"}}}}', shown=str(tmp_path / "c.yaml"))
    assert list(imported.data[section]) == ["a"]
    loads(imported, tmp_path)


@pytest.mark.parametrize(
    ("volume", "mounts", "arguments"),
    [
        ("./a:/b", ["{folder}/a:/b"], []),
        ("../a:/b:ro,z", ["{parent}/a:/b:ro"], []),
        ("name:/b", ["p_name:/b"], []),
        ("mine:/b", ["mine:/b"], []),
        ("/b", [], ["--mount", "type=volume,target=/b"]),
        ({"type": "bind", "source": "./a", "target": "/b", "read_only": True}, ["{folder}/a:/b:ro"], []),
        ({"type": "tmpfs", "target": "/t"}, [], ["--mount", "type=tmpfs,target=/t"]),
    ],
)
def test_volumes_are_those_of_compose(volume: Any, mounts: list[str], arguments: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "p"
    folder.mkdir()
    text = f"name: p\nservices: {{a: {{image: x, volumes: [{volume!r}]}}}}\nvolumes: {{mine: {{external: true}}}}"
    docker = import_compose(text, shown=str(folder / "c.yaml")).data["services"]["a"]["runtime"]["docker"]
    found = [one.replace(f"{folder}/../", f"{tmp_path}/").replace("/./", "/") for one in docker.get("mounts", [])]
    assert found == [one.format(folder=folder, parent=tmp_path) for one in mounts]
    assert docker.get("args", []) == arguments


@pytest.mark.parametrize(
    "text", ["", "a: 1", "services: {}", "services: [a]", "services: {a: {build: .}}", "services: {a: 1}"]
)
def test_compose_file_without_images_is_refused(text: str) -> None:
    with pytest.raises(ConfigError):
        import_compose(text, shown="c.yaml")


@pytest.mark.parametrize("field", ['ports: ["1-5:1-5"]', 'volumes: ["a:b"]', 'command: "\'"', 'volumes: ["a,b:/c"]'])
def test_compose_field_that_cannot_be_read_is_reported(field: str, tmp_path: Path) -> None:
    text = f"services: {{a: {{image: x, {field}}}, b: {{image: y}}}}"
    imported = import_compose(text, shown=str(tmp_path / "c.yaml"))
    assert any(entry.subject == "a" and entry.outcome == "refused" for entry in imported.report.entries)
    loads(imported, tmp_path)


def test_vllm_arguments_become_options() -> None:
    found = read_vllm(
        textwrap.dedent('org/m -tp 2 --port 1 --seed=3 --hf-overrides {"a":1} --lora-modules a=b c=d --x').split()
    )
    assert found == (
        {"model": "org/m", "tensor_parallel_size": 2, "seed": 3, "hf_overrides": {"a": 1}, "lora_modules": ["a=b", "c=d"],
         "extra_args": {"x": True}},
        [],
    )  # fmt: skip
    assert read_vllm(["--seed", "x"]) == "has --seed x"
    assert read_vllm(["a", "b"]) == "has 'b', which belongs to no argument"
    assert read_vllm([]) == "names no model"


def test_vllm_importer_knows_the_options_of_the_engine() -> None:
    known = {*vllm_server.WHOLE, *vllm_server.REAL, *vllm_server.TEXTS, *vllm_server.FLAGS, *vllm_server.JSON}
    beyond = {"model", "served_model_name", "lora_modules", "extra_args", "sleep_level", "shutdown_timeout", "offline", "cache_root",
              "hf_home", "cpu_kvcache_space", "kv_cache_memory", "kv_offloading_backend", "safetensors_load_strategy",
              "optimization_level", "cudagraph_capture_sizes"}  # fmt: skip
    assert known | beyond == set(VllmOptions.model_fields)
    assert set(REMOVED) >= vllm_server.REMOVED
