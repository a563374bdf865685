"""Models loaded, unloaded and pinned by an operator, and how they are reported."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.daemon import fake, fleetd
from tests.support.ports import free_port
from tests.support.waiting import until

ROUTED = """
models:
  good: {{engine: process, command: {command}, memory: 1MiB}}
  other: {{engine: process, command: {command}, memory: 1MiB}}
  rt: {{aliases: [both], route: [{{to: good}}, {{to: other}}]}}
"""


@pytest.mark.parametrize("verb", ["load", "unload", "pin", "unpin"])
@pytest.mark.parametrize("name", ["rt", "both"])
def test_route_cannot_be_loaded_or_pinned(verb: str, name: str, tmp_path: Path) -> None:
    with fleetd(tmp_path, ROUTED.format(command=fake())).start() as daemon:
        answer = daemon.control("POST", f"/v1/models/{verb}", {"names": ["good", name]})
        assert (answer.status, answer.code) == (409, "is_a_route")
        assert answer.json["error"]["message"] == f"{name} is a route: name its models (good, other)."
        rows = {row["name"]: (row["pinned"], row["loads"]) for row in daemon.status()["models"]}
        assert rows == dict.fromkeys(("good", "other", "rt"), (False, 0)), "nothing was done"
        if verb == "pin":
            results = daemon.control("POST", "/v1/models/pin", {"names": ["all"]}).json["results"]
            assert [(row["name"], row["result"]) for row in results] == [("good", "ok"), ("other", "ok")]


def test_load_evicted_by_the_same_request_is_a_failure(tmp_path: Path) -> None:
    fleet = "devices: {host: {budget: 100MiB}}\nmodels:\n"
    for name in ("a", "b", "c"):
        fleet += f"  {name}: {{engine: process, command: {fake('--model', name)}, memory: 40MiB, min_resident: 0}}\n"
    with fleetd(tmp_path, fleet).start() as daemon:
        assert daemon.control("POST", "/v1/models/load", {"names": ["a", "b"]}).status == 200
        answer = daemon.control("POST", "/v1/models/load", {"names": ["a", "b", "c"]})
        assert answer.status == 409
        rows = {row["name"]: row for row in answer.json["results"]}
        [left] = [name for name in "ab" if rows[name]["result"] == "failed"]  # whichever is cheaper to load again
        assert rows[left]["reason"] == "loaded, then left memory: evicted for c", json.dumps(rows)
        assert [row["result"] for row in rows.values()].count("ok") == 2


def test_context_length_comes_from_the_server(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    command = json.dumps(["env", "OLLAMA_CONTEXT_LENGTH=256", *json.loads(fake("--models", "m=1000", api="ollama"))])
    fleet = f"""
    instances:
      store: {{engine: ollama, command: {command}, port: {free_port()}, options: {{models_dir: {tmp_path}/store, context_length: 512}}}}
    models:
      m: {{instance: store, memory: 1MiB}}
    """
    with fleetd(tmp_path, fleet).start() as daemon:
        daemon.until_state("store", "READY")
        assert daemon.model_row("m")["context_length"] == 512, "what the entry says, while nothing is loaded"
        assert daemon.control("POST", "/v1/models/m/load", {}).status == 200
        until(lambda: daemon.model_row("m")["context_length"] == 256, "what the server says")
