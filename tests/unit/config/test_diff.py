"""The plan: what is added, changed and removed, at what cost, and that no secret is in it."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from fleetd.config.diff import ConfigChange, FieldChange, diff
from fleetd.config.load import load
from fleetd.config.schema.change_effects import EFFECTS, Effect, effect_of
from fleetd.config.schema.fleet import FleetConfig
from fleetd.config.schema.model import EngineModel, HeldModel, RouteModel
from fleetd.config.schema.process import Instance, Service
from fleetd.config.secrets import is_secret, redact

KINDS: dict[str, type[BaseModel]] = {
    "service": Service,
    "instance": Instance,
    "held model": HeldModel,
    "engine model": EngineModel,
    "route": RouteModel,
    "fleet": FleetConfig,
}


def leaves(model: type[BaseModel], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for name, field in model.model_fields.items():
        inner = block_of(field.annotation)
        here = (*path, field.alias or name)
        if not path and model is FleetConfig and name in ("services", "instances", "models"):
            continue
        if inner is not None and here != ("defaults",):
            yield from leaves(inner, here)
        else:
            yield here


def block_of(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := block_of(part)) is not None), None)


ALL_LEAVES = [(kind, ".".join(path)) for kind, model in KINDS.items() for path in leaves(model)]


@pytest.mark.parametrize(("kind", "path"), ALL_LEAVES)
def test_effect_of_every_key_is_known(kind: str, path: str) -> None:
    assert effect_of(kind, tuple(path.split("."))) in Effect


def test_effects_table_has_only_existing_keys() -> None:
    for kind, table in EFFECTS.items():
        known = [path for of, path in ALL_LEAVES if of == kind]
        for entry in table:
            assert any(path == entry or path.startswith(entry + ".") for path in known), f"{kind}: {entry}"


def test_effect_of_unknown_key_raises() -> None:
    with pytest.raises(KeyError):
        effect_of("service", ("brand_new",))


SERVICE = "services: {a: {command: x, %s}}\n"
INSTANCE = "instances: {o: {engine: ollama, %s}}\n"
ENGINE = "models: {m: {engine: vllm, %s}}\n"
HELD = "instances: {o: {engine: ollama}, p: {engine: ollama}}\nmodels: {m: {instance: o, %s}}\n"

CHANGES: tuple[tuple[str, str, str, str], ...] = (
    (SERVICE, "port: 3000", "port: 3001", "port: 3000 -> 3001 restart"),
    (SERVICE, "port: 3000", "", "port: 3000 -> (none) restart"),
    (SERVICE, "replicas: 1", "replicas: 3", "replicas: 1 -> 3 scale"),
    (SERVICE, "args: [a]", "args: [a, b]", 'args: ["a"] -> ["a", "b"] restart'),
    (SERVICE, "cwd: /a", "cwd: /b", "cwd: /a -> /b restart"),
    (SERVICE, "user: a", "user: b", "user: a -> b restart"),
    (SERVICE, 'umask: "0022"', 'umask: "0077"', "umask: 0022 -> 0077 restart"),
    (SERVICE, "env: {A: '1'}", "env: {A: '2'}", "env.A: 1 -> 2 restart"),
    (SERVICE, "env: {}", "env: {A: '2'}", "env.A: (none) -> 2 restart"),
    (SERVICE, "env: {API_KEY: one}", "env: {API_KEY: two}", "env.API_KEY: •••• -> •••• restart"),
    (SERVICE, "args: [--api-key, one]", "args: [--api-key, two]", 'args: ["--api-key", "••••"] -> ["--api-key", "••••"] restart'),
    (SERVICE, "env_file: a", "env_file: [a, b]", 'env_file: ["a"] -> ["a", "b"] restart'),
    (SERVICE, "restart: {backoff: {initial: 1s}}", "restart: {backoff: {initial: 90s}}", "restart.backoff.initial: 1s -> 1m30s hot"),
    (SERVICE, "restart: {policy: always}", "restart: {policy: never}", "restart.policy: always -> never hot"),
    (SERVICE, "stop: {timeout: 1s}", "stop: {timeout: 2s}", "stop.timeout: 1s -> 2s hot"),
    (SERVICE, "logs: {max_size: 1MiB}", "logs: {max_size: 1MB}", "logs.max_size: 1MiB -> 1MB hot"),
    (SERVICE, "logs: {capture: file}", "logs: {capture: pipe}", "logs.capture: file -> pipe restart"),
    (SERVICE, "limits: {memory: 1GiB}", "limits: {memory: 2GiB}", "limits.memory: 1GiB -> 2GiB hot"),
    (SERVICE, "limits: {nofile: 100}", "limits: {nofile: 200}", "limits.nofile: 100 -> 200 restart"),
    (SERVICE, "limits: {cpu: [0]}", "limits: {cpu: [0, 1]}", "limits.cpu: [0] -> [0, 1] restart"),
    (SERVICE, "limits: {}", "limits: {nice: 5}", "limits.nice: (none) -> 5 restart"),
    (SERVICE, "max_age: 1d", "max_age: 2d", "max_age: 1d -> 2d hot"),
    (SERVICE, "enabled: true", "enabled: false", "enabled: true -> false hot"),
    (SERVICE, "requires: [/a]", "requires: [/b]", 'requires: ["/a"] -> ["/b"] hot'),
    (SERVICE, "hooks: {}", "hooks: {pre_start: x y}", 'hooks.pre_start: (none) -> ["x", "y"] hot'),
    (SERVICE, "", "watch: {paths: dist, debounce: 500ms}",
     'watch.paths: (none) -> ["dist"] hot; watch.ignore: (none) -> [] hot; watch.debounce: (none) -> 500ms hot'),
    (SERVICE, "schedule: {restart: 0 4 * * *}", "", "schedule.restart: 0 4 * * * -> (none) hot; schedule.timezone: UTC -> (none) hot"),
    (SERVICE, "port: 1, probes: {liveness: {tcp: true}}", "port: 1, probes: {liveness: {http: /h}}",
     "probes.liveness.http: (none) -> /h hot; probes.liveness.tcp: true -> false hot"),
    (INSTANCE, "options: {num_parallel: 4}", "options: {num_parallel: 8}", "options.num_parallel: 4 -> 8 restart"),
    (INSTANCE, "options: {}", "options: {num_parallel: 8}", "options.num_parallel: (none) -> 8 restart"),
    (INSTANCE, "device: host", "device: gpu0", "device: host -> gpu0 restart"),
    (INSTANCE, "start: always", "start: on-demand", "start: always -> on-demand hot"),
    (INSTANCE, "runtime: {docker: {image: a}}", "runtime: {docker: {image: b}}", "runtime.docker.image: a -> b restart"),
    (ENGINE, "memory: auto", "memory: {gpu0: 1GiB}", 'memory: auto -> {"gpu0": "1GiB"} hot'),
    (ENGINE, "served_as: a", "served_as: b", "served_as: a -> b restart"),
    (ENGINE, "options: {api_key: a}", "options: {api_key: b}", "options.api_key: •••• -> •••• restart"),
    (HELD, "ttl: 1m", "ttl: 2m", "ttl: 1m -> 2m hot"),
    (HELD, "ttl: 0", "ttl: 2m", "ttl: 0s -> 2m hot"),
    (HELD, "pin: false", "pin: true", "pin: false -> true hot"),
    (HELD, "priority: 0", "priority: 5", "priority: 0 -> 5 hot"),
    (HELD, "concurrency: 1", "concurrency: 2", "concurrency: 1 -> 2 hot"),
    (HELD, "queue: {max: 1}", "queue: {max: 2}", "queue.max: 1 -> 2 hot"),
    (HELD, "aliases: a", "aliases: b", 'aliases: ["a"] -> ["b"] hot'),
    (HELD, "from: a", "from: b", "from: a -> b reload"),
    (HELD, "modelfile: {system: a}", "modelfile: {system: b}", "modelfile.system: a -> b reload"),
    (HELD, "modelfile: {parameters: {num_ctx: 1}}", "modelfile: {parameters: {num_ctx: 2}}",
     "modelfile.parameters.num_ctx: 1 -> 2 reload"),
)  # fmt: skip


def shown_change(field: FieldChange) -> str:
    old, new = ("(none)" if text is None else text for text in (field.old, field.new))
    return f"{field.path}: {old} -> {new} {field.effect}"


def config(folder: Path, text: str) -> FleetConfig:
    path = folder / "fleet.yaml"
    path.write_text(text, encoding="utf-8")
    return load(path, {}).config


@pytest.mark.parametrize(("frame", "old", "new", "expected"), CHANGES)
def test_diff_changed_key_has_values_and_effect(frame: str, old: str, new: str, expected: str, tmp_path: Path) -> None:
    (change,) = diff(config(tmp_path, frame % old), config(tmp_path, frame % new))
    assert "; ".join(map(shown_change, change.fields)) == expected
    assert change.action == "change"


def test_diff_equal_meaning_is_empty(tmp_path: Path) -> None:
    one = config(tmp_path, "defaults: {model: {ttl: 7m}}\nmodels: {m: {engine: vllm, memory: 1GiB, env: {A: 1}}}\n")
    two = config(
        tmp_path, "models:\n  m:\n    env: {A: '1'}\n    memory: 1073741824\n    ttl: 420s\n    engine: vllm\n"
    )
    assert diff(one, two) == ()


def test_diff_follows_the_new_file_and_removes_last(tmp_path: Path) -> None:
    old = config(tmp_path, "services: {a: {command: x, port: 1}, b: {command: x}}\ninstances: {o: {engine: ollama}}\n"
                           "models: {m: {instance: o}}\ngateway: {queue: {max: 5}}\n")  # fmt: skip
    new = config(tmp_path, "services: {a: {command: x, port: 2, max_age: 1d}, c: {command: x}}\n"
                           "models: {m: {engine: vllm}}\ngateway: {queue: {max: 6}, listen: '127.0.0.1:9'}\n")  # fmt: skip
    assert [
        " ".join(filter(None, (change.action, change.section, change.name, *map(shown_change, change.fields))))
        for change in diff(old, new)
    ] == [
        "change fleet gateway.listen: 127.0.0.1:8484 -> 127.0.0.1:9 daemon gateway.queue.max: 5 -> 6 hot",
        "change services a max_age: (none) -> 1d hot port: 1 -> 2 restart",
        "add services c",
        "remove models m",
        "add models m",
        "remove services b",
        "remove instances o",
    ]


def test_diff_without_old_fleet_adds_everything(tmp_path: Path) -> None:
    plan = diff(None, config(tmp_path, "services: {a: {command: x}}\nmodels: {m: {engine: vllm}}\n"))
    assert plan == (ConfigChange("add", "services", "a", "service"), ConfigChange("add", "models", "m", "engine model"))  # type: ignore[arg-type]


def test_diff_of_five_thousand_models_is_quick(tmp_path: Path) -> None:
    def text(ttl: str) -> str:
        return "".join(f"  m{i}: {{engine: vllm, ttl: {ttl}}}\n" for i in range(5000))

    old, new = config(tmp_path, "models:\n" + text("1m")), config(tmp_path, "models:\n" + text("2m"))
    start = time.process_time()
    assert len(diff(old, new)) == 5000
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    ("name", "secret"),
    [("HF_TOKEN", True), ("apiKey", True), ("--api-key", True), ("DB_PASSWORD", True), ("AWS_SECRET_ACCESS_KEY", True), ("token", True),
     ("NODE_ENV", False), ("MONKEY", False), ("KEYBOARD", False), ("max_tokens", False), ("keys_file", False), ("TOKENIZER", False)],
)  # fmt: skip
def test_is_secret_recognizes_names(name: str, secret: bool) -> None:
    assert is_secret(name) == secret


def test_redact_hides_secrets_at_every_place() -> None:
    shown = redact(
        {
            "env": {"A": "1", "API_KEY": "x"},
            "args": ["--token", "x", "--token=x", "-v", "http://u:p@h"],
            "n": {"secret": [1, 2]},
        }
    )
    assert shown == {
        "env": {"A": "1", "API_KEY": "••••"},
        "args": ["--token", "••••", "--token=••••", "-v", "http://••••@h"],
        "n": {"secret": "••••"},
    }
