"""Imports of systemd units, supervisord.conf and LiteLLM's config.yaml: the result, the report, and that it loads."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from fleetd.config.importers.litellm import import_litellm
from fleetd.config.importers.report import Imported
from fleetd.config.importers.supervisord import import_supervisord
from fleetd.config.importers.systemd import import_systemd
from fleetd.errors import ConfigError
from tests.unit.config.test_import_models import loads, said

UNIT = r"""
# a model server
[Unit]
Description=llama
After=network.target
[Service]
Type=exec
Environment="MODEL=/m/a b.gguf" LIST="-np 2"
Environment=CUDA_VISIBLE_DEVICES=1
EnvironmentFile=-/etc/llama.env
ExecStartPre=/bin/mkdir -p %h/x
ExecStart=-/opt/llama-server -m ${MODEL} $LIST \
  --ctx-size 8192 --host 0.0.0.0 \
  # a comment inside
  --port 9001 --api-key ${API_KEY}
WorkingDirectory=/srv
User=root
Restart=on-failure
RestartSec=2min
TimeoutStopSec=45
KillSignal=SIGINT
LimitNOFILE=65536:65536
MemoryMax=8G
ProtectSystem=strict
[Install]
WantedBy=multi-user.target
"""


def test_unit_of_llama_server_becomes_a_typed_model(tmp_path: Path) -> None:
    imported = import_systemd(UNIT, shown="/etc/systemd/system/llama.service")
    loads(imported, tmp_path, {"API_KEY": "k"})
    assert imported.data["models"]["llama"] == {
        "engine": "llamacpp", "command": ["/opt/llama-server"],
        "options": {"model": "/m/a b.gguf", "api_key": "${API_KEY:-}", "parallel": 2, "context_length": 4096},
        "env": {"MODEL": "/m/a b.gguf", "LIST": "-np 2", "CUDA_VISIBLE_DEVICES": "1"}, "port": 9001, "start": "always", "preload": True,
        "ttl": 0, "env_file": ["/etc/llama.env"], "cwd": "/srv", "user": "root", "limits": {"nofile": 65536, "memory": "8GiB"},
        "restart": {"policy": "on-failure", "backoff": {"initial": "2m"}}, "stop": {"timeout": "45s", "signal": "SIGINT"},
        "hooks": {"pre_start": ["/bin/mkdir", "-p", f"{Path.home()}/x"]},
    }  # fmt: skip
    report = said(imported)
    assert report["llama:ProtectSystem", "refused"] == "has no equivalent"
    assert report["llama:After", "refused"] == "has no equivalent"
    assert "systemctl disable --now llama.service" in report["llama:", "warning"]


@pytest.mark.parametrize(
    ("command", "section", "engine"),
    [
        ("/usr/bin/ollama serve", "instances", "ollama"),
        ("/opt/venv/bin/vllm serve org/m --port 8001 --max-model-len 4096", "models", "vllm"),
        ("python3 -m vllm.entrypoints.openai.api_server --model org/m", "models", "vllm"),
        ("/usr/bin/llama-server -hf org/m", "services", None),
        ("/usr/bin/node app.js", "services", None),
    ],
)
def test_unit_becomes_the_entry_that_it_runs(command: str, section: str, engine: str | None, tmp_path: Path) -> None:
    imported = import_systemd(f"[Service]\nExecStart={command}\n", shown="x.service")
    loads(imported, tmp_path)
    entry = imported.data[section]["x"]
    assert entry.get("engine") == engine
    assert entry["restart"] == {"policy": "never"}


SUPERVISOR = """
[supervisord]
nodaemon=true
[program:web]
command=/usr/bin/python3 app.py --port 80%(process_num)02d --key %(ENV_KEY)s ; a comment
directory=%(here)s
environment=A="1,2",B='x',C=%(ENV_C)s
numprocs=2
process_name=%(program_name)s_%(process_num)02d
autorestart=true
startsecs=5
startretries=3
stopsignal=QUIT
stopwaitsecs=20
stdout_logfile=/x
nothing=1
[program:ollama]
command=ollama serve
autostart=false
environment=OLLAMA_HOST="0.0.0.0:11500"
[program:empty]
[group:g]
programs=web
[include]
files = conf.d/*.conf
"""


def test_supervisord_programs_become_entries(tmp_path: Path) -> None:
    imported = import_supervisord(SUPERVISOR, shown=str(tmp_path / "s.conf"))
    loads(imported, tmp_path, {"KEY": "k"})
    assert imported.data["services"]["web"] == {
        "command": ["/usr/bin/python3", "app.py", "--port", "80{index}", "--key", "${KEY:-}"],
        "env": {"A": "1,2", "B": "x", "C": "${C:-}"}, "cwd": str(tmp_path), "replicas": 2,
        "restart": {"stable_after": "5s", "crash_loop": {"count": 4}}, "stop": {"signal": "SIGQUIT", "timeout": "20s"},
    }  # fmt: skip
    ollama = imported.data["instances"]["ollama"]
    assert (ollama["port"], ollama["enabled"], ollama["restart"]) == (11500, False, {"policy": "on-failure"})
    report = said(imported)
    assert report["empty:", "refused"] == "has no command"
    assert report["web:nothing", "refused"] == "has no equivalent"
    assert "import each file" in report[":[include]", "refused"]


LITELLM = """
model_list:
  - {model_name: chat, litellm_params: {model: ollama/llama3, api_base: "http://10.0.0.2:11434"}}
  - {model_name: chat, litellm_params: {model: openai/qwen, api_base: "http://10.0.0.3:8000/v1", api_key: none}}
  - {model_name: gpt 4, litellm_params: {model: gpt-4o, temperature: 0.2}}
  - {model_name: near, litellm_params: {model: hosted_vllm/org/m, api_base: os.environ/NEAR, api_key: os.environ/NEAR_KEY}}
  - {model_name: far, litellm_params: {model: bedrock/x}}
  - {model_name: "*", litellm_params: {model: "openai/*"}}
  - {model_name: bare, litellm_params: {model: hosted_vllm/x}}
  - text
router_settings: {routing_strategy: least-busy, fallbacks: [{chat: [near, gone]}]}
general_settings: {master_key: sk-1234}
"""


def test_litellm_models_become_external_ones(tmp_path: Path) -> None:
    imported = import_litellm(LITELLM)
    loads(imported, tmp_path, {"OPENAI_API_KEY": "o", "NEAR": "http://n", "NEAR_KEY": "k"})
    assert imported.data["instances"] == {
        "ollama-10.0.0.2": {"engine": "ollama", "external": "http://10.0.0.2:11434"},
        "openai-10.0.0.3": {"engine": "external", "external": "http://10.0.0.3:8000"},
        "openai": {"engine": "external", "external": "https://api.openai.com", "options": {"api_key": "${OPENAI_API_KEY}"}},
        "hosted_vllm-NEAR": {"engine": "external", "external": "${NEAR}", "options": {"api_key": "${NEAR_KEY}"}},
    }  # fmt: skip
    assert imported.data["models"] == {
        "chat-1": {"instance": "ollama-10.0.0.2", "served_as": "llama3"},
        "chat-2": {"instance": "openai-10.0.0.3", "served_as": "qwen"},
        "chat": {"route": [{"to": "chat-1"}, {"to": "chat-2"}], "fallback": ["near"]},
        "gpt-4": {"instance": "openai", "served_as": "gpt-4o"},
        "near": {"instance": "hosted_vllm-NEAR", "served_as": "org/m"},
    }
    report = said(imported)
    assert "dialect of bedrock" in report["far:model_list[4]", "refused"]
    assert "list the models" in report["*:model_list[5]", "refused"]
    assert "has no api_base" in report[":model_list[6]", "refused"]
    assert ("gpt-4:litellm_params.temperature", "refused") in report
    assert "sk-1234" not in imported.text + "\n".join(imported.report.lines())


@pytest.mark.parametrize(
    ("convert", "text"),
    [
        (import_systemd, ""),
        (import_systemd, "[Unit]\nDescription=x\n"),
        (import_systemd, "hello\n"),
        (import_systemd, "[Service]\nExecStart=\n"),
        (import_supervisord, ""),
        (import_supervisord, "hello\n"),
        (import_supervisord, "[program:a]\ncommand='\n"),
        (import_supervisord, "[supervisord]\n"),
        (import_litellm, "a: 1"),
        (import_litellm, "model_list: []"),
        (import_litellm, "model_list: [{litellm_params: {model: bedrock/x}}]"),
        (import_litellm, "- a"),
    ],
)
def test_file_of_another_program_is_refused(convert: Callable[..., Imported], text: str) -> None:
    with pytest.raises(ConfigError):
        convert(text)


def test_literal_braces_of_other_managers_stay_text() -> None:
    unit = import_systemd("[Service]\nEnvironment=A={port}\nExecStart=/x --n {name} $A ${A}\n", shown="x.service").data[
        "services"
    ]["x"]
    assert (unit["command"], unit["env"]) == (["/x", "--n", "{{name}}", "{{port}}", "{{port}}"], {"A": "{{port}}"})
    program = import_supervisord("[program:x]\ncommand=/x {name} %(process_num)d\n").data["services"]["x"]
    assert program["command"] == ["/x", "{{name}}", "{index}"]
