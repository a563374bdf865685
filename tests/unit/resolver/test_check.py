"""One `check` reports all: a type error does not hide the mistakes that only resolving finds."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from fleetd.config.load import load
from fleetd.errors import ConfigError, Problem
from fleetd.resolver import check

CLASH = "services: {a: {command: x, port: 7001}, b: {command: x, port: 7001}}\n"


def problems(folder: Path, fleet: str) -> list[Problem]:
    path = folder / "fleet.yaml"
    path.write_text("version: 1\n" + textwrap.dedent(fleet), "utf-8")
    with pytest.raises(ConfigError) as caught:
        check.load_and_resolve(path, {"PATH": "/bin", "HOME": "/root"})
    return list(caught.value.problems)


def places(folder: Path, fleet: str) -> list[str]:
    return [problem.path for problem in problems(folder, fleet)]


def test_check_port_conflict_hides_no_other_mistake(tmp_path: Path) -> None:
    found = problems(
        tmp_path,
        CLASH + "instances:\n"
        "  ol: {engine: ollama, port: 7001, options: {kv_cache_type: q8_0, flash_attention: false}, env: {OLLAMA_HOST: x}}\n"
        "models:\n"
        "  m: {instance: ol, served_as: 'bad name!', options: {num_ctx: -3}}\n",
    )
    assert [(problem.line, problem.path) for problem in found] == [
        (2, "services.b.port"),
        (4, "instances.ol.port"),
        (4, "instances.ol.options.kv_cache_type"),
        (4, "instances.ol.env.OLLAMA_HOST"),
        (6, "models.m.served_as"),
        (6, "models.m.options.num_ctx"),
    ]


def test_check_invalid_entry_hides_no_other_entry(tmp_path: Path) -> None:
    assert places(
        tmp_path,
        """
        gateway: {max_body: 10G}
        services: {a: {command: x, restrt: 1}}
        instances: {ol: {engine: ollama}}
        models:
          m: {instance: ol, quantize: q3, from: /m.gguf}
          n: {instance: ol, modelfile: {system: 5}, served_as: 'not checked!'}
        """,
    ) == ["gateway.max_body", "services.a.restrt", "models.m.quantize", "models.n.modelfile.system"]


def test_check_invalid_common_key_hides_no_engine_mistake(tmp_path: Path) -> None:
    assert places(
        tmp_path,
        """
        instances: {ol: {engine: ollama, restart: 5, env: {OLLAMA_KEEP_ALIVE: 5m}}}
        models: {m: {instance: ol, pin: yes, queue: {max: -1}, served_as: 'bad name!'}}
        """,
    ) == [
        "instances.ol.restart",
        "instances.ol.env.OLLAMA_KEEP_ALIVE",
        "models.m.pin",
        "models.m.queue.max",
        "models.m.served_as",
    ]


@pytest.mark.parametrize("mistake", ["external: nowhere", "external: 'http://h:1', port: 80", "nope: 1", "env: 5"])
def test_check_models_of_invalid_instance_are_checked(mistake: str, tmp_path: Path) -> None:
    """No problem of the instance itself is reported: its key may be valid for an external server."""
    found = places(
        tmp_path,
        f"""
        instances: {{ol: {{engine: ollama, {mistake}, options: {{api_key: k}}}}}}
        models: {{m: {{instance: ol, served_as: 'bad name!'}}, n: {{instance: ol-2}}}}
        """,
    )
    assert [path for path in found if path.startswith("models.")] == ["models.m.served_as", "models.n.instance"]
    assert not [path for path in found if path.startswith("instances.ol.options")]


def test_check_invalid_options_hide_no_env_and_no_models(tmp_path: Path) -> None:
    """No further problem of the options is reported: a valid one may depend on an invalid one."""
    assert places(
        tmp_path,
        """
        instances:
          ol:
            engine: ollama
            options: {num_parallel: 0, flash_attention: "off", kv_cache_type: q8_0, api_key: k}
            env: {OLLAMA_KEEP_ALIVE: 5m}
        models: {m: {instance: ol, served_as: 'bad name!'}}
        """,
    ) == [
        "instances.ol.options.num_parallel",
        "instances.ol.options.flash_attention",
        "instances.ol.env.OLLAMA_KEEP_ALIVE",
        "models.m.served_as",
    ]


def test_check_reports_probe_and_option_together(tmp_path: Path) -> None:
    assert places(
        tmp_path,
        """
        services: {s: {command: x, probes: {readiness: {tcp: true}}}}
        instances: {v: {engine: process, command: x, args: ["{nope}"], options: {healthy: 1}}}
        models: {a: {instance: v}, b: {instance: v}}
        """,
    ) == ["services.s.probes", "instances.v", "instances.v.options.healthy"]


def test_check_unset_variable_is_reported_once(tmp_path: Path) -> None:
    assert places(
        tmp_path,
        """
        instances: {ol: {engine: ollama, options: {kv_cache_type: "${NOPE}"}}}
        models: {m: {instance: ol, from: "${NOPE}", quantize: q3}}
        """,
    ) == ["instances.ol.options.kv_cache_type", "models.m.from", "models.m.quantize"]


@pytest.mark.parametrize(
    "fleet",
    [
        "models: 5",
        "models: {m: 5, n: [], o: {}}",
        "instances: {ol: {engine: 7}, p: {engine: nope, replicas: 0}, q: {}}\nmodels: {m: {instance: [ol, p, q]}}",
        "instances: [x]\nmodels: {m: {instance: x}}",
        "devices: {unified: {}, gpu0: {}}\nservices: {'': {command: x}}",
        "nonsense: 1\ninclude: gone.yaml\ndefaults: {process: {restart: 5}, model: 7}\nservices: {s: {command: x}}",
        "models: {'': {instance: ''}, 'a.b': {engine: llamacpp, options: {model: []}}, a: {b: 1}}",
        "version: 2\npaths: {state: 5}\ngateway: []\nadmin: {listen: nowhere}",
    ],
)
def test_check_broken_file_reports_each_problem_once(fleet: str, tmp_path: Path) -> None:
    found = problems(tmp_path, fleet)
    assert found
    assert len({(one.line, one.column, one.path, one.message) for one in found}) == len(found)


def test_source_map_order_of_files_is_cached(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text("version: 1\nservices: {a: {command: x}}\n", "utf-8")
    source_map = load(path, {}).source_map
    assert source_map.order_of(str(path)) == 0
    del source_map.root
    assert source_map.order_of(str(path)) == 0
    assert source_map.order_of("other.yaml") > 0
