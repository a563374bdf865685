"""Measure how long a request to an unloaded model waits: fleetd, the bare engine, llama-swap and Ollama.

    python -m bench.cold [--rounds 15] [--layers 2 --embedding 64]

Bare: the same engine command started by hand, polled every 2 ms, then asked. The others: one request through the program,
with no model in memory (cold) or with another model to evict first (swap). Programs that are not on PATH are skipped with
a message.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import subprocess
import time
from pathlib import Path

from bench.rig import RunningFleet, answers, chat, scratch, summary
from bench.tiny_gguf import TinyModel, write
from fleetd.engines.base import LaunchContext
from fleetd.engines.registry import load
from tests.support.ports import free_port
from tests.support.waiting import until


def bare(model: Path, rounds: int) -> list[float]:
    """Start the engine by hand and ask it: seconds from spawn to the first byte of the answer."""
    engine = load("llamacpp")
    took: list[float] = []
    for _ in range(rounds):
        port = free_port()
        options = engine.options.model_validate(
            {"model": str(model), "context_length": 512, "parallel": 1, "threads": 1}
        )
        launch = engine.launch(LaunchContext(name="a", options=options, host="127.0.0.1", port=port, served_as="a"))
        began = time.monotonic()
        child = subprocess.Popen(
            launch.argv, env={**os.environ, **launch.env}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            until(lambda p=port: answers(p), "the bare engine answers", period_s=0.002)  # type: ignore[misc]
            chat(port, "a")
            took.append(time.monotonic() - began)
        finally:
            child.send_signal(signal.SIGTERM)
            child.wait()
    return took


def through_fleetd(folder: Path, models: list[Path], rounds: int) -> tuple[list[float], list[float]]:
    """Return (cold, swap) seconds to the first byte through fleetd's gateway."""
    entries = "\n".join(
        f"  {name}: {{engine: llamacpp, memory: 600MiB, options: {{model: {path}, context_length: 512, parallel: 1, threads: 1}}}}"
        for name, path in zip("ab", models, strict=True)
    )
    text = f"devices: {{host: {{budget: 1GiB}}}}\nmodels:\n{entries}\n"
    cold: list[float] = []
    swap: list[float] = []
    with RunningFleet(folder, text, free_port()) as fleet:
        for index in range(rounds):
            fleet.ctl("unload", "a", "b")
            first, second = chat(fleet.port, "a")[0], chat(fleet.port, "b")[0]
            if index:  # the first round fills the page cache
                cold.append(first)
                swap.append(second)
    return cold, swap


def through_llama_swap(folder: Path, models: list[Path], rounds: int) -> list[float]:
    """Return seconds to the first byte through llama-swap, changing between two models."""
    engine = load("llamacpp")
    lines = ["healthCheckTimeout: 15", "models:"]
    for name, path in zip("ab", models, strict=True):
        options = engine.options.model_validate(
            {"model": str(path), "context_length": 512, "parallel": 1, "threads": 1}
        )
        launch = engine.launch(LaunchContext(name=name, options=options, host="127.0.0.1", port=65001, served_as=name))
        command = " ".join(f"'{word}'" for word in launch.argv).replace("65001", "${PORT}")
        environment = ", ".join(f'"{key}={value}"' for key, value in launch.env.items())
        lines += [f"  {name}:", "    cmd: |", f"      {command}", f"    env: [{environment}]"]
    (folder / "swap.yaml").write_text("\n".join(lines) + "\n")
    port = free_port()
    command_line = ["llama-swap", "-config", str(folder / "swap.yaml"), "-listen", f"127.0.0.1:{port}"]
    child = subprocess.Popen(command_line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took: list[float] = []
    try:
        until(lambda: answers(port), "llama-swap answers")
        for index in range(rounds):
            swaps = [chat(port, name)[0] for name in "ab"]
            took += swaps if index else []
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()
    return took


def through_ollama(folder: Path, models: list[Path], rounds: int) -> list[float]:
    """Return seconds to the first byte through one `ollama serve` that holds one model at a time."""
    port = free_port()
    environment = {
        **os.environ,
        "OLLAMA_HOST": f"127.0.0.1:{port}",
        "OLLAMA_MODELS": str(folder / "store"),
        "OLLAMA_MAX_LOADED_MODELS": "1",
        "OLLAMA_CONTEXT_LENGTH": "512",
        "HOME": str(folder),
    }
    child = subprocess.Popen(["ollama", "serve"], env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    took: list[float] = []
    try:
        until(lambda: answers(port, "/api/version"), "ollama answers")
        for name, path in zip("ab", models, strict=True):
            (folder / f"Modelfile.{name}").write_text(f"FROM {path}\n")
            subprocess.run(
                ["ollama", "create", name, "-f", str(folder / f"Modelfile.{name}")],
                env=environment,
                check=True,
                capture_output=True,
            )
        for index in range(rounds):
            swaps = [chat(port, name)[0] for name in "ab"]
            took += swaps if index else []
    finally:
        child.send_signal(signal.SIGTERM)
        child.wait()
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=16)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--embedding", type=int, default=64)
    asked = parser.parse_args()
    with scratch("cold") as folder:
        models = [folder / f"{name}.gguf" for name in "ab"]
        for seed, path in enumerate(models):
            write(
                path,
                TinyModel(layers=asked.layers, embedding=asked.embedding, feed_forward=2 * asked.embedding, seed=seed),
            )
        half = max(2, asked.rounds // 2)
        by_hand = bare(models[0], half)
        cold, swap = through_fleetd(folder, models, asked.rounds)
        by_hand += bare(models[0], half)
        base_s = statistics.median(by_hand)
        print(f"model: {models[0].stat().st_size / 2**20:.1f} MiB")
        print(f"{'bare engine, by hand':31} {summary(by_hand)}")
        _say("fleetd, nothing in memory", cold, base_s)
        _say("fleetd, one model to evict", swap, base_s)
        for program, measure in (("llama-swap", through_llama_swap), ("ollama", through_ollama)):
            if shutil.which(program) is None:
                print(f"{program}: not on PATH, left out")
                continue
            _say(f"{program}, one model to evict", measure(folder, models, max(3, asked.rounds // 4)), base_s)


def _say(what: str, took: list[float], base_s: float) -> None:
    print(f"{what:31} {summary(took)}   over bare: {(statistics.median(took) - base_s) * 1000:+.1f} ms")


if __name__ == "__main__":
    main()
