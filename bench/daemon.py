"""Measure the cost of the daemon: start, memory with 20 services, CPU time when idle, `fleetctl status`.

python -m bench.daemon [--idle 30] [--starts 5] [--models 0]

The fleet has 20 services and one model of the embedded engine, which is loaded by the first request. Memory is reported
for services alone, with an engine's options, and after work: 1,000 requests and three reloads.
`--models N` measures instead a reload of a file with N models, and the latency of gateway requests during it.
"""

from __future__ import annotations

import argparse
import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

from bench.rig import DEADLINE_S, RunningFleet, chat, scratch, summary
from bench.tiny_gguf import TinyModel, write
from tests.support.ports import free_port
from tests.support.waiting import until

_TICKS = os.sysconf("SC_CLK_TCK")
_SERVICES = "services:\n" + "".join(
    f"  service-{index:02}: {{command: [/bin/sleep, '86400']}}\n" for index in range(20)
)
_REQUESTS, _RELOADS = 1000, 3


def cpu_s(pid: int) -> float:
    """Return the user and system seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def say(what: str, value: str) -> None:
    print(f"{what:<42} {value}", flush=True)


def say_memory(fleet: RunningFleet, when: str) -> None:
    say(f"resident memory, {when}", f"{rss_bytes(fleet.pid) / 2**20:8.1f} MiB")


def all_ready(fleet: RunningFleet) -> bool:
    return all(row["state"] == "READY" for row in fleet.status()["processes"] if row["kind"] == "service")


def reload(fleet: RunningFleet) -> float:
    """Ask for a reload; return the seconds it took. Raises RuntimeError."""
    began = time.monotonic()
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(DEADLINE_S * 4)
    client.connect(str(fleet.socket))
    connection = http.client.HTTPConnection("localhost")
    connection.sock = client
    try:
        connection.request("POST", "/v1/reload", "{}", {"Content-Type": "application/json"})
        answer = connection.getresponse()
        body = answer.read()
        if answer.status != 200:
            raise RuntimeError(f"reload: {answer.status}: {body[:300]!r}")
    finally:
        connection.close()
    return time.monotonic() - began


def starts(count: int) -> None:
    """Show how long `fleetd run` takes to answer on its gateway, and the processor time of that."""
    took: list[float] = []
    used: list[float] = []
    for _ in range(count):
        with scratch("daemon") as folder:
            fleet = RunningFleet(folder, _SERVICES, free_port())
            began = time.monotonic()
            with fleet:
                took.append(time.monotonic() - began)
                used.append(cpu_s(fleet.pid))
    say("start: fleetd run to serving", summary(took))
    say("start: processor time of the daemon", summary(used))


def idle(fleet: RunningFleet, idle_s: float) -> None:
    """Print the share of a core that an idle daemon uses."""
    before, began = cpu_s(fleet.pid), time.monotonic()
    until(lambda: time.monotonic() - began >= idle_s, "the idle time", deadline_s=idle_s + 60, period_s=0.5)
    share = (cpu_s(fleet.pid) - before) / (time.monotonic() - began)
    say("processor when idle", f"{share * 100:8.2f} % of a core over {idle_s:g} s")


def status(fleet: RunningFleet) -> None:
    took: list[float] = []
    script = Path(sys.executable).with_name("fleetctl")
    for _ in range(15):
        at = time.monotonic()
        command = [str(script), "--socket", str(fleet.socket), "status"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        took.append(time.monotonic() - at)
    say("fleetctl status", summary(took))


def with_services(idle_s: float) -> None:
    with scratch("daemon") as folder, RunningFleet(folder, _SERVICES, free_port()) as fleet:
        until(lambda: all_ready(fleet), "20 services")
        say_memory(fleet, "20 services")
        idle(fleet, idle_s)
        say("reload that changes nothing", summary([reload(fleet) for _ in range(_RELOADS)]))
        say_memory(fleet, f"after {_RELOADS} reloads")
        status(fleet)


def with_a_model() -> None:
    with scratch("daemon") as folder:
        model = folder / "tiny.gguf"
        write(model, TinyModel())
        options = f"{{model: {model}, context_length: 512, parallel: 1, threads: 1}}"
        text = f"{_SERVICES}models:\n  tiny: {{engine: llamacpp, memory: 600MiB, options: {options}}}\n"
        with RunningFleet(folder, text, free_port()) as fleet:
            until(lambda: all_ready(fleet), "20 services")
            say_memory(fleet, "and a model's options")
            took = [chat(fleet.port, "tiny")[0] for _ in range(_REQUESTS)]
            say(f"{_REQUESTS} requests, one after the other", summary(took))
            say_memory(fleet, f"after {_REQUESTS} requests")
            for _ in range(_RELOADS):
                reload(fleet)
            say_memory(fleet, f"after {_RELOADS} reloads more")


def with_many(count: int) -> None:
    """Show what a reload of very many models does to everybody else: the longest wait for GET /health on one connection."""
    entries = "".join(
        f"  m{n}: {{engine: process, command: [/bin/true, '{{port}}'], memory: 1GiB}}\n" for n in range(count)
    )
    with (
        scratch("daemon") as folder,
        RunningFleet(folder, f"watch: false\n{_SERVICES}models:\n{entries}", free_port()) as fleet,
    ):
        until(lambda: all_ready(fleet), "20 services")
        say_memory(fleet, f"{count} models")
        waits: list[float] = []
        over = threading.Event()

        def ask() -> None:
            connection = http.client.HTTPConnection("127.0.0.1", fleet.port, timeout=DEADLINE_S)
            while not over.is_set():
                began = time.monotonic()
                connection.request("GET", "/health")
                connection.getresponse().read()
                waits.append(time.monotonic() - began)
                over.wait(0.002)
            connection.close()

        thread = threading.Thread(target=ask)
        thread.start()
        try:
            fleet.config.write_text(fleet.config.read_text().replace("m7:", "renamed:"))
            say(f"reload of {count} models", summary([reload(fleet) for _ in range(_RELOADS + 1)]))
        finally:
            over.set()
            thread.join()
        say("GET /health meanwhile: the longest", f"{max(waits) * 1000:8.1f} ms of {len(waits)}")
        say_memory(fleet, f"after {_RELOADS + 1} reloads")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to watch the idle daemon")
    parser.add_argument("--starts", type=int, default=5, help="how often to start it")
    parser.add_argument("--models", type=int, default=0, help="measure reloads of this many models instead")
    asked = parser.parse_args()
    if asked.models:
        with_many(asked.models)
        return
    starts(asked.starts)
    with_services(asked.idle)
    with_a_model()


if __name__ == "__main__":
    main()
