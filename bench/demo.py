"""Show fleetd on real inference in under a minute: six workers, six models, memory for three.

    python -m bench.demo                       run it; exit 0 only if every request was answered within the budget
    python -m bench.demo --write-models DIR    only write the models of the repository's own fleet.yaml

Invariants:
- All files are in ./.demo and are deleted at the end, except for the log. The models are tiny and random: their text is
  noise, their loads and their memory are real.
- The same requests run twice: one after another, then from six workers. All printed numbers are measured.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.tiny_gguf import write
from tests.support.ports import free_port

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / ".demo"
MODELS = ("iris", "juno", "kepler", "luna", "mira", "nova")
EXAMPLE_MODELS = ("alpha", "beta", "gamma", "delta")
WORKERS, ROUNDS, TOKENS = 6, 4, 48
MIB = 1024 * 1024
BUDGET_BYTES = 110 * MIB  # a model is estimated at 32 MiB: three fit, the fourth has to wait for one to leave


@dataclass(frozen=True, slots=True)
class Answered:
    """One request, as its client saw it. `error` is empty when it was answered."""

    number: int
    model: str
    status: int
    total_s: float
    wait_ms: int = 0
    load_ms: int = 0
    tokens: int = 0
    error: str = ""


@dataclass(slots=True)
class Watch:
    """Memory during the requests: of the ledger, and of the engine processes."""

    most_reserved: int = 0
    most_resident: int = 0
    most_engines: int = 0
    samples: int = 0
    stop: threading.Event = field(default_factory=threading.Event)


class UnixConnection(http.client.HTTPConnection):
    """HTTP over the control socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("fleetd", timeout=10)
        self._path = str(path)

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self._path)


def write_models(folder: Path, names: tuple[str, ...]) -> None:
    """Write those that are not there yet."""
    for seed, name in enumerate(names, start=1):
        path = folder / f"{name}.gguf"
        if not path.is_file():
            write(path, layers=2 + seed % 2, seed=seed, name=name)


def write_fleet(port: int, run: Path) -> Path:
    lines = [
        "version: 1", "name: demo",
        f"paths: {{state: ./state, run: {json.dumps(str(run))}, logs: ./logs}}",
        f"gateway: {{listen: 127.0.0.1:{port}}}", "watch: false",
        f"devices: {{host: {{budget: {BUDGET_BYTES // MIB}MiB}}}}",
        "defaults: {model: {min_resident: 0, ttl: 5m}}", "models:",
    ]  # fmt: skip
    for name in MODELS:
        options = f"{{model: ./models/{name}.gguf, context_length: 512, parallel: 2, threads: 1}}"
        lines += [f"  {name}:", "    engine: llamacpp", f"    options: {options}"]
    path = FOLDER / "fleet.yaml"
    path.write_text("\n".join(lines) + "\n", "utf-8")
    return path


# -- the daemon ----------------------------------------------------------------------------------------------------------


def start(config: Path, log: Path) -> subprocess.Popen[bytes]:
    with log.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "fleetd", "run", "--config", str(config)], stdout=file, stderr=file, cwd=ROOT
        )


def wait_until_up(daemon: subprocess.Popen[bytes], port: int, log: Path) -> float:
    """Return how long it took. Ends the program when the daemon does not come."""
    began = time.monotonic()
    while time.monotonic() - began < 30:
        if daemon.poll() is not None:
            break
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=1)
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return time.monotonic() - began
        except OSError:
            time.sleep(0.01)
        finally:
            connection.close()
    sys.exit(f"fleetd did not start; its log is {log}:\n{log.read_text('utf-8', 'replace')[-2000:]}")


def status(run: Path) -> dict[str, Any]:
    connection = UnixConnection(run / "fleetd.sock")
    try:
        connection.request("GET", "/v1/status")
        found: dict[str, Any] = json.loads(connection.getresponse().read())
        return found
    finally:
        connection.close()


def watch_memory(daemon: subprocess.Popen[bytes], run: Path, watch: Watch) -> None:
    """Compare the ledger with the memory that the engines really hold, again and again."""
    parent = psutil.Process(daemon.pid)
    while not watch.stop.wait(0.05):
        try:
            reserved = status(run)["devices"][0]["reserved_bytes"]
            resident = [child.memory_info().rss for child in parent.children() if "llama" in " ".join(child.cmdline())]
        except (OSError, psutil.Error, http.client.HTTPException, ValueError, KeyError):
            continue
        watch.samples += 1
        watch.most_reserved = max(watch.most_reserved, reserved)
        watch.most_resident = max(watch.most_resident, sum(resident))
        watch.most_engines = max(watch.most_engines, len(resident))


def watch_events(run: Path, stop: threading.Event, say: Any) -> None:
    """Print loads and evictions as they happen."""
    connection = UnixConnection(run / "fleetd.sock")
    try:
        connection.request("GET", "/v1/events?follow=1", headers={"Accept": "text/event-stream"})
        response = connection.getresponse()
        for line in response:
            if stop.is_set():
                return
            if line.startswith(b"data:"):
                shown = shown_event(json.loads(line[5:]))
                if shown:
                    say(shown)
    except (OSError, ValueError, http.client.HTTPException):
        return
    finally:
        connection.close()


def shown_event(event: dict[str, Any]) -> str | None:
    if event.get("kind") != "model" or event.get("event") != "state_changed":
        return None
    name, reason = event["name"], event["reason"]
    if event["state"] == "LOADED":
        return f"  + {name:<7} in memory"
    if event["state"] == "UNLOADING":
        return f"  - {name:<7} leaves: {reason}"
    return None


# -- requests ------------------------------------------------------------------------------------------------------------


def ask(port: int, number: int, model: str) -> Answered:
    """Send one chat request through the gateway."""
    body = {
        "model": model,
        "messages": [{"role": "user", "content": f"request {number}"}],
        "max_tokens": TOKENS,
        "ignore_eos": True,
    }
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    began = time.monotonic()
    try:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        response = connection.getresponse()
        data = json.loads(response.read())
        took = time.monotonic() - began
        if response.status != 200:
            return Answered(number, model, response.status, took, error=str(data)[:200])
        return Answered(
            number, model, 200, took,
            wait_ms=int(float(response.headers.get("X-Fleet-Queue-Ms", 0))),
            load_ms=int(float(response.headers.get("X-Fleet-Load-Ms", 0))),
            tokens=int(data["usage"]["completion_tokens"]),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, http.client.HTTPException) as error:
        return Answered(number, model, 0, time.monotonic() - began, error=f"{type(error).__name__}: {error}")
    finally:
        connection.close()


def requests() -> Iterator[tuple[int, str]]:
    """Yield the requests: each worker goes through all models, each beginning with another."""
    for turn in range(ROUNDS):
        for worker in range(WORKERS):
            yield turn * WORKERS + worker + 1, MODELS[(worker + turn) % len(MODELS)]


def one_after_another(port: int) -> tuple[list[Answered], float]:
    began = time.monotonic()
    return [ask(port, number, model) for number, model in requests()], time.monotonic() - began


def six_workers(port: int, said: Any) -> tuple[list[Answered], float]:
    def worker(index: int) -> list[Answered]:
        mine = [request for position, request in enumerate(requests()) if position % WORKERS == index]
        answers = []
        for number, model in mine:
            answer = ask(port, number, model)
            said(shown_answer(answer))
            answers.append(answer)
        return answers

    began = time.monotonic()
    with ThreadPoolExecutor(WORKERS) as pool:
        found = [answer for answers in pool.map(worker, range(WORKERS)) for answer in answers]
    return sorted(found, key=lambda answer: answer.number), time.monotonic() - began


def shown_answer(answer: Answered) -> str:
    if answer.error:
        return f"  ! {answer.model:<7} request {answer.number}: {answer.status} {answer.error}"
    return f"    {answer.model:<7} answered request {answer.number} in {answer.total_s:.2f} s"


# -- the whole -----------------------------------------------------------------------------------------------------------


def loads_and_evictions(run: Path) -> tuple[int, int]:
    models = status(run)["models"]
    return sum(model["loads"] for model in models), sum(model["evictions"] for model in models)


def print_table(answers: list[Answered]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="six workers, each request", title_justify="left")
    table.add_column("#", justify="right")
    table.add_column("model")
    for title in ("wait", "of it loading", "tokens", "in all"):
        table.add_column(title, justify="right")
    for answer in answers:
        load = f"{answer.load_ms} ms" if answer.load_ms else "warm"
        table.add_row(
            str(answer.number),
            answer.model,
            f"{answer.wait_ms} ms",
            load,
            str(answer.tokens),
            f"{answer.total_s:.2f} s",
        )
    Console(width=max(60, min(100, os.get_terminal_size().columns if sys.stdout.isatty() else 80))).print(table)


def summary(
    serial_s: float, parallel_s: float, serial: tuple[int, int], parallel: tuple[int, int], watch: Watch, failed: int
) -> None:
    over = watch.most_reserved > BUDGET_BYTES
    print(f"requests           {2 * ROUNDS * WORKERS}, of which answered {2 * ROUNDS * WORKERS - failed}")
    print(f"one after another  {serial_s:.2f} s, {serial[0]} loads, {serial[1]} evictions")
    print(f"six workers        {parallel_s:.2f} s, {parallel[0]} loads, {parallel[1]} evictions")
    print(f"speed-up           {serial_s / parallel_s:.1f}x")
    print(
        f"memory             budget {BUDGET_BYTES // MIB} MiB; reserved at most {watch.most_reserved // MIB} MiB; "
        f"measured at most {watch.most_resident // MIB} MiB in {watch.most_engines} engines ({watch.samples} samples)"
    )
    print(f"budget             {'EXCEEDED' if over else 'never exceeded'}")


def demo() -> int:
    FOLDER.mkdir(exist_ok=True)
    write_models(FOLDER / "models", MODELS)
    port = free_port()
    run = FOLDER / "run" if len(str(FOLDER)) < 80 else Path(f"/tmp/fleetd-demo-{os.getuid()}-{os.getpid()}")
    config, log = write_fleet(port, run), FOLDER / "fleetd.log"
    print(
        f"{len(MODELS)} models of about 32 MiB, a budget of {BUDGET_BYTES // MIB} MiB, {ROUNDS * WORKERS} requests, twice"
    )
    daemon = start(config, log)
    watch, lock = Watch(), threading.Lock()

    def say(text: str) -> None:
        with lock:
            print(text, flush=True)

    try:
        took = wait_until_up(daemon, port, log)
        say(f"fleetd is up after {took:.2f} s on http://127.0.0.1:{port}")
        threads = [
            threading.Thread(target=watch_memory, args=(daemon, run, watch)),
            threading.Thread(target=watch_events, args=(run, watch.stop, say), daemon=True),
        ]
        for thread in threads:
            thread.start()
        say("one after another:")
        serial, serial_s = one_after_another(port)
        before = loads_and_evictions(run)
        say(f"six workers (the first round took {serial_s:.2f} s):")
        parallel, parallel_s = six_workers(port, say)
        after = loads_and_evictions(run)
        watch.stop.set()
        threads[0].join()
    finally:
        watch.stop.set()
        code = stop(daemon)
    failed = [answer for answer in (*serial, *parallel) if answer.error]
    print_table(parallel)
    during = (after[0] - before[0], after[1] - before[1])
    summary(serial_s, parallel_s, before, during, watch, len(failed))
    for answer in failed:
        print(shown_answer(answer), file=sys.stderr)
    if code != 0:
        print(f"fleetd ended with code {code}; its log is {log}", file=sys.stderr)
    measured_over = max(watch.most_reserved, watch.most_resident) > BUDGET_BYTES
    return 1 if failed or code != 0 or measured_over else 0


def stop(daemon: subprocess.Popen[bytes]) -> int:
    """End the daemon as systemd would; it takes its engines with it."""
    if daemon.poll() is None:
        daemon.send_signal(signal.SIGTERM)
    try:
        return daemon.wait(30)
    except subprocess.TimeoutExpired:
        daemon.kill()
        return daemon.wait()


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.demo", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--write-models", type=Path, metavar="DIR", help="only write the models of the example fleet.yaml"
    )
    args = parser.parse_args()
    if args.write_models is not None:
        write_models(args.write_models, EXAMPLE_MODELS)
        return 0
    return demo()


if __name__ == "__main__":
    sys.exit(main())
