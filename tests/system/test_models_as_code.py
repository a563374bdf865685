"""Models as code with a real daemon: created in the store before their load, once for all replicas, again only when changed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.tiny_gguf import write
from tests.support.daemon import ROOT, Fleetd, fleetd
from tests.support.waiting import until

pytestmark = pytest.mark.skipif(shutil.which("ollama") is None, reason="no program named ollama on PATH")


def ports(count: int) -> int:
    """Return the first of `count` consecutive free ports below Ollama's runners."""
    import socket

    for first in range(23000, 32000, 7):
        try:
            for port in range(first, first + count):
                with socket.socket() as probe:
                    probe.bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
    raise AssertionError("no free ports")


def fleet(folder: Path, temperature: float = 0.5, more: str = "", port: int = 0) -> str:
    return f"""
    devices: {{host: {{budget: 4GiB}}}}
    instances:
      ollama: {{engine: ollama, replicas: 2, port: {port}, device: host, options: {{models_dir: {folder}/store}}}}
    models:
      a:
        instance: ollama
        from: "{folder}/a model.gguf"
        modelfile: {{system: hello, parameters: {{temperature: {temperature}, num_ctx: 256}}}}
      q: {{instance: ollama, from: "{folder}/a model.gguf", quantize: q8_0, modelfile: {{parameters: {{num_ctx: 256}}}}}}
      typo: {{instance: ollama, from: "{folder}/no such file.gguf"}}
      {more}
    """


def ctl(daemon: Fleetd, *words: str) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "fleetd.cli.fleetctl", "--socket", str(daemon.socket), *words],
        capture_output=True,
        text=True,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    return done.returncode, done.stdout + done.stderr


def made(daemon: Fleetd, name: str) -> list[str]:
    events: list[dict[str, Any]] = daemon.control("GET", "/v1/events?follow=0&after=0").json["events"]
    return [event["reason"] for event in events if event["name"] == name and event["event"] == "model_made"]


def test_models_are_created_once_changed_and_pruned(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    write(tmp_path / "a model.gguf", layers=1, embedding=64)
    port = ports(2)
    with fleetd(tmp_path, fleet(tmp_path, port=port)) as daemon:
        daemon.start()
        daemon.until_state("ollama-1", "READY")
        daemon.until_state("ollama-2", "READY")
        until(lambda: all(daemon.model_row(n).get("store", {}).get("state") == "made" for n in "aq"), "both are made")
        assert daemon.chat("a").status == 200
        assert daemon.chat("q").status == 200
        assert (len(made(daemon, "a")), len(made(daemon, "q"))) == (1, 1), "made once for both replicas"
        answer = daemon.chat("typo")
        assert (answer.status, answer.code) == (503, "model_blocked")
        assert f"models.typo.from: {tmp_path}/no such file.gguf (does not exist)" in str(answer.json)
        code, output = ctl(daemon, "models", "diff")
        assert (code, "typo: blocked" in output, "  + a" in output) == (1, True, False)
        code, output = ctl(daemon, "models", "show", "a")
        assert (code, f"FROM {tmp_path}/a model.gguf\nSYSTEM hello\n" in output, "in place" in output) == (
            0,
            True,
            True,
        )
        assert "loaded on ollama-" in output

        daemon.write(fleet(tmp_path, 0.9, port=port).replace("\n      q: ", "\n      # q: "))
        until(lambda: len(made(daemon, "a")) == 2, "a changed parameter creates the model again")
        until(lambda: daemon.model_row("a")["state"] == "LOADED", "and it is back in memory")
        assert "PARAMETER temperature 0.9" in ctl(daemon, "models", "show", "a")[1]
        assert "- q: delete" in ctl(daemon, "models", "diff")[1]
        assert ctl(daemon, "models", "prune")[0] == 2
        assert ctl(daemon, "models", "prune", "-y")[0] == 0
        assert "q" not in ctl(daemon, "models", "diff")[1].replace("requires", "")
        assert (tmp_path / "a model.gguf").is_file()

        (tmp_path / "no such file.gguf").write_bytes((tmp_path / "a model.gguf").read_bytes())
        until(lambda: daemon.chat("typo").status == 200, "the file came, and the model with it")
        code, output = ctl(daemon, "models", "sync", "-o", "json")
        last = json.loads(output.splitlines()[-1])
        assert (code, last["what"], last["failed"], last["made"]) == (0, "done", 0, 0)
        assert ctl(daemon, "models", "diff")[0] == 0
