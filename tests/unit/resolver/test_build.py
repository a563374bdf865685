"""From fleet.yaml to processes, models and devices: every rule, on values."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from fleetd.config.load import load
from fleetd.control.wire import Plan
from fleetd.core.data.specs import FootprintSource, ProcessKind
from fleetd.daemon.reload.messages import Reading, ReadInputs, pack, unpack
from fleetd.daemon.reload.worker import read
from fleetd.errors import ConfigError
from fleetd.resolver import check
from fleetd.resolver.build import resolve_fleet
from fleetd.resolver.change_plan import plan_of, restarting
from fleetd.resolver.resolved import MachineDevice, ResolvedFleet, Surroundings

GIB = 2**30
HOST = MachineDevice("host", "host", 10 * GIB)
GPU = MachineDevice("gpu0", "gpu", 8 * GIB, "GPU-1")


def resolved(folder: Path, fleet: str, *devices: MachineDevice, **around: object) -> ResolvedFleet:
    path = folder / "fleet.yaml"
    path.write_text("version: 1\n" + textwrap.dedent(fleet), "utf-8")
    surroundings = Surroundings(devices or (HOST,), env={"PATH": "/bin", "HOME": "/root"}, **around)  # type: ignore[arg-type]
    return resolve_fleet(load(path, {}), surroundings, hostname="box")


def planned(
    folder: Path, *fleets: str, between: Callable[[], object] = lambda: None
) -> tuple[ResolvedFleet, ResolvedFleet, Plan]:
    """Return the last two resolved fleets and the plan between them, as read in another process."""
    found = []
    path = folder / "fleet.yaml"
    kept, ports = None, {}
    for fleet in fleets:
        path.write_text("version: 1\n" + textwrap.dedent(fleet), "utf-8")
        around = Surroundings((HOST,), env={"PATH": "/bin", "HOME": "/root"}, ports=ports)
        reading = read(load(path, {}), ReadInputs(around, frozenset(), "box", kept))
        found.append(unpack(pack(reading), Reading))
        kept, ports = found[-1].kept, found[-1].resolved.ports
        between()
    *_, old, new = found
    return old.resolved, new.resolved, plan_of(old.resolved, new.resolved, new.edits, None)


def test_replicas_have_names_ports_and_variables(tmp_path: Path) -> None:
    found = resolved(
        tmp_path, 'services: {w: {command: [x, "{port}", "{replica}", "{other}"], replicas: 3, port: 3000}}'
    )
    assert list(found.plans) == ["w-1", "w-2", "w-3"]
    assert [plan.launch.argv for plan in found.plans.values()] == [
        ("x", str(2999 + n), str(n), "{other}") for n in (1, 2, 3)
    ]
    assert found.plans["w-2"].own_env == {"FLEETD_REPLICA": "2", "PORT": "3001", "FLEETD_NAME": "w-2"}
    assert {spec.base for spec in found.spec.processes.values()} == {"w"}


def test_dependency_on_replicated_entry_means_all_replicas(tmp_path: Path) -> None:
    found = resolved(tmp_path, "services: {w: {command: x, replicas: 2}, a: {command: y, depends_on: {w: started}}}")
    assert [(d.name, d.condition) for d in found.spec.processes["a"].depends_on] == [
        ("w-1", "started"),
        ("w-2", "started"),
    ]


def test_port_is_assigned_if_used_and_then_kept(tmp_path: Path) -> None:
    fleet = 'services: {a: {command: [x, "{port}"]}, b: {command: y}}'
    first = resolved(tmp_path, fleet)
    assert first.spec.processes["b"].port is None
    port = first.spec.processes["a"].port
    again = resolved(
        tmp_path, fleet.replace("services: {", 'services: {new: {command: [z, "{port}"]}, '), ports=first.ports
    )
    assert again.spec.processes["a"].port == port
    assert again.spec.processes["new"].port != port


def test_run_folder_too_long_for_a_socket_is_a_problem(tmp_path: Path) -> None:
    for length, count in ((105, 0), (106, 1), (200, 1)):
        folder = "/" + "r" * (length - len("//fleetd.sock"))
        found = resolved(tmp_path, f"paths:\n  run: {folder}\nservices: {{a: {{command: x}}}}\n")
        assert len(found.problems) == count
        for problem in found.problems:
            assert (problem.line, problem.path) == (3, "paths.run")
            assert f"has {length} bytes, at most 105 are possible (choose a shorter folder)" in problem.message


def test_environment_later_source_wins(tmp_path: Path) -> None:
    (tmp_path / "one.env").write_text("A=file\nB=file\n")
    found = resolved(tmp_path, "services: {a: {command: x, env_file: one.env, env: {A: entry}}}")
    env = found.plans["a"].environment({"A": "parent", "PATH": "/bin", "NOTIFY_SOCKET": "/run/n", "FLEETD_X": "1"})
    assert env == {"PATH": "/bin", "A": "entry", "B": "file", "FLEETD_NAME": "a"}


def test_env_file_missing_blocks_and_invalid_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "bad.env").write_text("A=1\nnonsense\n")
    (tmp_path / "folder").mkdir()
    found = resolved(
        tmp_path,
        "services:\n  a: {command: x, env: {B: b}, env_file: [vol/gone.env]}\n  b: {command: x, env_file: bad.env}\n"
        "  c: {command: x, env_file: folder}\n",
    )
    reported = [str(problem).splitlines()[0] for problem in found.problems]
    assert len(reported) == 2
    assert any(
        "fleet.yaml:5:" in line and "services.c.env_file" in line and "cannot be read" in line for line in reported
    )
    assert any("bad.env:2:" in line for line in reported)
    (warning,) = found.warnings
    path = str(tmp_path / "vol" / "gone.env")
    assert warning.line == 3
    assert f"services.a.env_file[0]: {path} is missing: a stays BLOCKED until it exists" in str(warning)
    plan = found.plans["a"]
    assert (plan.requires, plan.unread, plan.required_by) == ((path,), (path,), {path: "services.a.env_file"})
    assert plan.own_env == {"B": "b", "FLEETD_NAME": "a"}


def test_option_unknown_name_has_place_and_hint(tmp_path: Path) -> None:
    found = resolved(tmp_path, "models:\n  m:\n    engine: llamacpp\n    options: {model: x.gguf, context_lenght: 4}\n")
    line = str(found.problems[0]).splitlines()[0]
    assert "fleet.yaml:5:" in line
    assert "models.m.options.context_lenght: unknown option: did you mean context_length?" in line


def test_option_mistakes_are_reported_with_those_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "fleet.yaml"
    path.write_text(
        "version: 1\n"
        "services: {a: {command: x, restrt: {}}}\n"
        "models:\n"
        "  m: {engine: llamacpp, options: {model: x.gguf, context_lenght: 4}}\n"
        "  n: {engine: lamacpp}\n"
        "  o: {engine: vllm, options: {model: '${NOPE}', max_model_len: wat}}\n"
        "  p: {engine: vllm, options: 3}\n"
    )
    with pytest.raises(ConfigError) as caught:
        check.load_and_resolve(path, {})
    places = [(problem.line, problem.path) for problem in caught.value.problems]
    assert places == [
        (2, "services.a.restrt"),
        (4, "models.m.options.context_lenght"),
        (5, "models.n.engine"),
        (6, "models.o.options.model"),
        (6, "models.o.options.max_model_len"),
        (7, "models.p.options"),
    ]


def test_engine_unknown_name_is_a_problem(tmp_path: Path) -> None:
    found = resolved(tmp_path, "models: {m: {engine: lamacpp, options: {}}}")
    assert "unknown engine 'lamacpp'" in str(found.problems[0])


@pytest.mark.parametrize(
    ("devices", "expected"),
    [((HOST,), "host"), ((HOST, GPU), "gpu0"), ((MachineDevice("unified", "unified", GIB),), "unified")],
)
def test_device_default_depends_on_the_machine(
    tmp_path: Path, devices: tuple[MachineDevice, ...], expected: str
) -> None:
    found = resolved(tmp_path, "models: {m: {engine: llamacpp, options: {model: x.gguf}}}", *devices)
    assert found.plans["m"].device == expected


def test_budget_given_or_default(tmp_path: Path) -> None:
    fleet = "devices: {gpu0: {budget: 50%}, host: {budget: 4GiB}, gpu7: {budget: 1GiB}}\nservices: {}\n"
    found = resolved(tmp_path, fleet, HOST, GPU)
    assert {name: spec.budget_bytes for name, spec in found.spec.devices.items()} == {
        "host": 4 * GIB,
        "gpu0": 4 * GIB,
        "gpu7": GIB,
    }
    assert "this machine has no device 'gpu7'" in str(found.warnings[0])
    plain = resolved(tmp_path, "services: {}\n", HOST, GPU)
    assert plain.spec.devices["host"].budget_bytes == int(8 * GIB)
    assert plain.spec.devices["gpu0"].budget_bytes == int(7.2 * GIB)


def test_device_uuid_binds_a_name_to_a_card(tmp_path: Path) -> None:
    other = MachineDevice("gpu1", "gpu", 16 * GIB, "GPU-2")
    found = resolved(tmp_path, "devices: {gpu0: {uuid: GPU-2}}\nservices: {}\n", HOST, GPU, other)
    assert found.spec.devices["gpu0"].total_bytes == 16 * GIB


def test_footprint_is_declared_learned_or_unknown(tmp_path: Path) -> None:
    fleet = "models: {{m: {{engine: process, command: [x], memory: {memory}}}}}"
    declared = resolved(tmp_path, fleet.format(memory="1GiB"))
    assert declared.spec.models["m"].footprint.source is FootprintSource.DECLARED
    unknown = resolved(tmp_path, fleet.format(memory="auto"))
    assert unknown.spec.models["m"].footprint.bytes == {}
    assert "counts as 0" in str(unknown.warnings[-1])
    key = unknown.spec.models["m"].footprint_hash
    learned = resolved(tmp_path, fleet.format(memory="auto"), learned={key: {"host": 7}})
    assert learned.spec.models["m"].footprint.source is FootprintSource.LEARNED
    assert learned.spec.models["m"].footprint.bytes == {"host": 7}
    small = resolved(tmp_path, fleet.format(memory="1GiB"), learned={key: {"host": 3 * GIB}}).spec.models["m"]
    assert (small.footprint.bytes, small.footprint.source) == ({"host": 3 * GIB}, FootprintSource.LEARNED)


def test_sleeping_size_is_estimated_then_learned(tmp_path: Path) -> None:
    card = MachineDevice("gpu0", "gpu", 16 * 2**30)
    fleet = "models: {m: {engine: vllm, memory: 8GiB, options: {model: org/m, kv_cache_memory: 6GiB, gpu_memory_utilization: 0.6%s}}}"
    found = resolved(tmp_path, fleet % "", card)
    assert found.spec.models["m"].asleep is None
    assert not found.spec.processes["m"].capabilities.can_sleep
    found = resolved(tmp_path, fleet % ", enable_sleep_mode: true", card)
    spec = found.spec.models["m"]
    assert found.spec.processes["m"].capabilities.can_sleep
    assert spec.asleep == {"gpu0": 1536 * 2**20, "host": int(2.4 * 2**30) + 1}
    learned = {f"{spec.footprint_hash}:asleep": {"gpu0": 2**30}}
    spec = resolved(tmp_path, fleet % ", enable_sleep_mode: true", card, learned=learned).spec.models["m"]
    assert spec.asleep == {"gpu0": 2**30, "host": int(2.4 * 2**30) + 1}
    assert spec.footprint.source is FootprintSource.DECLARED


def test_sleep_level_without_sleep_mode_is_a_problem(tmp_path: Path) -> None:
    found = resolved(
        tmp_path, "models: {m: {engine: vllm, options: {model: o/m, gpu_memory_utilization: 0.5, sleep_level: 2}}}"
    )
    (problem,) = found.problems
    assert "models.m.options.sleep_level" in str(problem)
    assert "enable_sleep_mode" in str(problem)


def test_model_larger_than_its_budget_is_a_warning(tmp_path: Path) -> None:
    found = resolved(tmp_path, "models: {m: {engine: process, command: [x], memory: 100GiB}}")
    assert not found.problems
    assert "can never fit: needs 100.00 GiB on host" in str(found.warnings[-1])


def test_held_model_of_replicated_instance_has_all_holders(tmp_path: Path) -> None:
    fleet = """
    instances: {o: {engine: ollama, command: [ollama, serve], replicas: 2, port: 11434}}
    models: {m: {instance: o, served_as: "x:q8", memory: 1GiB}, one: {instance: o-2, memory: 1GiB}}
    """
    found = resolved(tmp_path, fleet)
    assert found.spec.models["m"].holders == ("o-1", "o-2")
    assert found.spec.models["one"].holders == ("o-2",)
    assert set(found.plans["o-1"].held) == {"m"}
    assert found.plans["o-2"].held["m"].served_as == "x:q8"
    assert found.spec.processes["o-1"].own_model is None
    assert found.spec.processes["o-1"].kind is ProcessKind.INSTANCE


def test_model_with_own_process_starts_on_demand(tmp_path: Path) -> None:
    found = resolved(tmp_path, "models: {m: {engine: process, command: [x], memory: 1GiB}}")
    spec = found.spec.processes["m"]
    assert (spec.on_demand, spec.own_model, found.spec.models["m"].holders) == (True, "m", ("m",))
    assert spec.port is not None


def test_external_server_is_only_probed(tmp_path: Path) -> None:
    found = resolved(tmp_path, "instances: {s: {engine: lmstudio, external: 'http://10.0.0.1:1234'}}")
    assert found.spec.processes["s"].capabilities.owns_process is False
    endpoint = found.plans["s"].endpoint
    assert endpoint is not None
    assert endpoint.base_url == "http://10.0.0.1:1234"


def test_probe_without_a_port_is_a_problem(tmp_path: Path) -> None:
    found = resolved(tmp_path, "services: {a: {command: x, probes: {startup: {http: /health}}}}")
    assert "needs a port" in str(found.problems[0])


def test_probe_is_completed_with_defaults(tmp_path: Path) -> None:
    found = resolved(tmp_path, "services: {a: {command: x, port: 1234, probes: {readiness: {http: /h, failures: 9}}}}")
    probe = found.spec.processes["a"].probes.readiness
    assert probe is not None
    assert (probe.http, probe.failures, probe.period_s) == ("/h", 9, 2.0)


def test_startup_deadline_is_the_load_timeout_of_the_model(tmp_path: Path) -> None:
    def deadline(more: str) -> float | None:
        found = resolved(tmp_path, f"models: {{m: {{engine: process, command: [x], memory: 1GiB{more}}}}}")
        startup = found.spec.processes["m"].probes.startup
        assert startup is not None
        return startup.deadline_s

    assert deadline("") == 900.0, "the engine's own"
    assert deadline(", load_timeout: 1h") == 3600.0
    assert deadline(", load_timeout: 4s") == 4.0
    assert deadline(", load_timeout: 4s, probes: {startup: {tcp: true, deadline: 9s}}") == 4.0
    assert deadline(", load_timeout: 20s, probes: {startup: {tcp: true, deadline: 9s}}") == 9.0


@pytest.mark.parametrize(
    ("change", "restarts"),
    [
        ("env: {A: '2'}", True),
        ("args: [more]", True),
        ("cwd: /tmp", True),
        ("limits: {nofile: 100}", True),
        ("stop: {timeout: 3s}", False),
        ("limits: {memory: 1GiB}", False),
        ("restart: {policy: never}", False),
        ("logs: {keep: 2}", False),
        ("logs: {capture: pipe}", True),
    ],
)
def test_plan_changed_key_restarts_or_is_hot(tmp_path: Path, change: str, restarts: bool) -> None:
    before, after, plan = planned(tmp_path, "services: {a: {command: x}}", f"services: {{a: {{command: x, {change}}}}}")
    assert restarting(before, after) == ({"a"} if restarts else set())
    assert plan["changes"][0]["effect"] == ("restart" if restarts else "hot")
    assert plan["unchanged"] == (0 if restarts else 1)


def test_plan_changed_source_reloads_only_its_model(tmp_path: Path) -> None:
    text = "instances: {{ol: {{engine: ollama}}}}\n"
    text += "models: {{m: {{instance: ol, from: {source}, memory: 1GiB, ttl: {ttl}}}}}\n"
    plans = [
        planned(tmp_path, text.format(source="a", ttl="1m"), text.format(source=source, ttl="2m"))[2] for source in "ab"
    ]
    assert [plan["changes"][0]["effect"] for plan in plans] == ["hot", "reload"]
    assert [(key["path"], key["effect"]) for key in plans[1]["changes"][0]["keys"]] == [
        ("ttl", "hot"),
        ("from", "reload"),
    ]
    assert [plan["unchanged"] for plan in plans] == [1, 1]


@pytest.mark.parametrize(
    ("before", "after", "effect", "stops", "starts", "unchanged"),
    [
        (2, 4, "scale", [], ["w-3", "w-4"], 2),
        (3, 2, "scale", ["w-3"], [], 2),
        (3, 1, "restart", ["w-1", "w-2", "w-3"], ["w"], 0),
        (1, 2, "restart", ["w"], ["w-1", "w-2"], 0),
    ],
)
def test_plan_changed_replicas_lists_stops_and_starts(
    tmp_path: Path, before: int, after: int, effect: str, stops: list[str], starts: list[str], unchanged: int
) -> None:
    *_, plan = planned(tmp_path, *(f"services: {{w: {{command: x, replicas: {n}}}}}" for n in (before, after)))
    (change,) = plan["changes"]
    assert (change["effect"], change["stops"], change["starts"]) == (effect, stops, starts)
    assert [(key["path"], key["effect"]) for key in change["keys"]] == [("replicas", effect)]
    assert plan["unchanged"] == unchanged


def test_plan_changed_env_file_restarts_its_process(tmp_path: Path) -> None:
    file = tmp_path / "b.env"
    fleet = "services: {b: {command: x, env_file: b.env%s}, c: {command: y}}"

    def edited(content: str | None, more: str = "") -> Plan:
        file.write_text("B=3\nDB_PASSWORD=one\n")

        def edit() -> None:
            if content is not None:
                file.write_text(content)
            else:
                file.unlink(missing_ok=True)

        return planned(tmp_path, fleet % "", fleet % more, between=edit)[2]

    (change,) = edited("B=4\nDB_PASSWORD=two\n")["changes"]
    assert change == {
        "kind": "service",
        "name": "b",
        "change": "change",
        "effect": "restart",
        "keys": [
            {"path": "env.B", "before": "3", "after": "4", "effect": "restart"},
            {"path": "env.DB_PASSWORD", "before": "••••", "after": "••••", "effect": "restart"},
        ],
    }
    (both,) = edited("B=4\nDB_PASSWORD=one\n", ", max_age: 1d")["changes"]
    assert both["effect"] == "restart"
    assert [(key["path"], key["effect"]) for key in both["keys"]] == [("max_age", "hot"), ("env.B", "restart")]
    (gone,) = edited(None)["changes"]
    assert gone["keys"][0] == {"path": "env_file", "before": str(file), "after": None, "effect": "restart"}
    assert edited("DB_PASSWORD=one\nB='3'\n")["changes"] == []


def test_plan_keeps_changes_that_need_a_daemon_restart(tmp_path: Path) -> None:
    fleet = "gateway: {listen: '127.0.0.1:%d', max_body: %s, queue: {max: %d}}\npaths: {state: ./%s}\n"
    one, two = (fleet % words for words in ((8001, "1MiB", 1, "a"), (8002, "2MiB", 2, "b")))
    waiting = {"gateway.listen", "gateway.max_body", "paths.state"}

    def keys(*fleets: str) -> dict[str, str]:
        (change,) = planned(tmp_path, *fleets)[2]["changes"]
        assert change["effect"] == "daemon"
        return {key["path"]: key["effect"] for key in change["keys"]}

    assert keys(one, two) == {**dict.fromkeys(waiting, "daemon"), "gateway.queue.max": "hot"}
    assert keys(one, two, two) == dict.fromkeys(waiting, "daemon")
    assert planned(tmp_path, one, two, one)[2]["changes"][0]["effect"] == "hot"


def test_plan_added_model_leaves_others_alone(tmp_path: Path) -> None:
    one = "models: {a: {engine: process, command: [x], memory: 1GiB}%s}"
    before, after, plan = planned(tmp_path, one % "", one % ", b: {engine: process, command: [y], memory: 1GiB}")
    assert restarting(before, after) == set()
    assert plan["changes"][0]["change"] == "add"


def test_missing_program_is_a_warning(tmp_path: Path) -> None:
    found = resolved(
        tmp_path, "models: {m: {engine: vllm, options: {model: /no/such}, memory: 1GiB, env: {PATH: /nowhere}}}"
    )
    assert not found.problems
    assert found.plans["m"].missing_program is not None
    assert "vllm" in str(found.warnings[0])


def test_container_launch_runs_the_client(tmp_path: Path) -> None:
    client = tmp_path / "docker"
    client.write_text("#!/bin/sh\n")
    client.chmod(0o755)
    fleet = """
    name: box
    instances:
      o:
        engine: ollama
        port: 11434
        env: {SOME_TOKEN: hush, HOME: /root}
        user: root
        runtime: {docker: {program: CLIENT, image: "ollama/ollama:0.30", mounts: [/data:/root/.ollama]}}
    """
    plan = resolved(tmp_path, fleet.replace("CLIENT", str(client))).plans["o"]
    assert plan.launch.argv[:2] == (str(client), "run")
    assert plan.launch.argv[-2:] == ("ollama/ollama:0.30", "serve")
    assert "hush" not in plan.launch.argv
    assert "SOME_TOKEN" in plan.launch.argv
    assert plan.contained is not None
    assert plan.contained.remove[:3] == (str(client), "rm", "--force")
    assert plan.contained.name.startswith("fleetd-box-")
    assert "HOME" not in plan.set_env()  # the client's own stays what it is
    assert "HOME=/root" in plan.launch.argv
    user = plan.launch.argv[plan.launch.argv.index("--user") + 1]
    assert user == "0:0"
    assert plan.execution.user is None
    assert "/data" in plan.requires


def test_container_without_client_is_a_warning(tmp_path: Path) -> None:
    fleet = """
    models:
      m: {engine: vllm, options: {model: org/m, gpu_memory_utilization: 0.5}, runtime: {docker: {image: v, program: /no/docker}}}
    """
    found = resolved(tmp_path, fleet)
    assert not found.problems
    (warning,) = [one for one in found.warnings if "docker" in one.message]
    assert warning.path == "models.m.runtime"
    assert "there is no program /no/docker" in warning.message
    assert found.plans["m"].missing_program is not None


def test_unknown_home_is_a_plain_folder(tmp_path: Path) -> None:
    fleet = """
    services: {a: {command: x, watch: {paths: ["~nouser/x", "~root", y]}}}
    models: {m: {engine: lmstudio, command: [x], runtime: {docker: {image: v, program: ~nouser/podman}}}}
    """
    found = resolved(tmp_path, fleet)
    assert found.plans["a"].watch is not None
    assert found.plans["a"].watch.paths == (tmp_path / "~nouser/x", Path("~root").expanduser(), tmp_path / "y")
    assert "there is no program ~nouser/podman" in "".join(one.message for one in found.warnings)


@pytest.mark.parametrize(
    ("entry", "path", "message"),
    [
        (
            "engine: lmstudio, runtime: {docker: {image: x}}",
            "instances.i.runtime",
            "does not know the program of the image",
        ),
        (
            "engine: ollama, user: no-such-user, runtime: {docker: {image: x}}",
            "instances.i.user",
            "no user 'no-such-user'",
        ),
    ],
)
def test_container_invalid_entry_is_a_problem(tmp_path: Path, entry: str, path: str, message: str) -> None:
    problems = resolved(tmp_path, f"instances: {{i: {{{entry}}}}}").problems
    assert [(one.path, message in one.message) for one in problems] == [(path, True)], problems


def test_bridged_container_listens_on_all_addresses(tmp_path: Path) -> None:
    entry = """
    instances:
      i: {engine: process, command: [serve, --host, "{host}"], port: 21999, options: {api: openai},
          runtime: {docker: {image: x, network: bridge, program: /bin/true}}}
    """
    plan = resolved(tmp_path, entry).plans["i"]
    assert plan.launch.argv[-2:] == ("--host", "0.0.0.0")
    assert "127.0.0.1:21999:21999" in plan.launch.argv
    assert plan.endpoint is not None
    assert plan.endpoint.base_url == "http://127.0.0.1:21999"
