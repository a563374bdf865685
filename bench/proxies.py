"""Measure requests per second through the gateway and other proxies in one run: `python -m bench.proxies`.

Invariants:
- Every proxy has the same origin: an nginx that answers a chat completion of 300 bytes at once and is never the limit.
- Requests are short chat questions, not streamed, sent by wrk from one thread over 1, 16 and 64 connections.
- Each round measures every proxy once, in turn; medians and the ratio to nginx are printed.
- The gateway runs with all its features. `--daemon` measures a complete `fleetd run` instead of the gateway alone.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from bench.rig import RunningFleet, scratch
from tests.support.ports import free_port

MODEL = "tiny"
ANSWER = (
    '{"id":"chatcmpl-1","object":"chat.completion","created":1700000000,"model":"tiny","choices":[{"index":0,"message":'
    '{"role":"assistant","content":"Fine, thank you. How can I help you today?"},"logprobs":null,"finish_reason":"stop"}],'
    '"usage":{"prompt_tokens":12,"completion_tokens":12,"total_tokens":24},"x":"0000"}'
)
QUESTION = (
    '{"model":"tiny","messages":[{"role":"user","content":"Hello, how are you?"}],"max_tokens":16,"temperature":0.7}'
)
LUA = f"""
wrk.method = "POST"
wrk.body = '{QUESTION}'
wrk.headers["Content-Type"] = "application/json"
"""
NGINX_HEAD = """
daemon off; worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.log error;
events {{ worker_connections 4096; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 600;
  client_body_temp_path {folder}/b; proxy_temp_path {folder}/p; fastcgi_temp_path {folder}/f;
  uwsgi_temp_path {folder}/u; scgi_temp_path {folder}/s;
"""
NGINX_ORIGIN = (
    NGINX_HEAD
    + """
  server {{
    listen 127.0.0.1:{port} backlog=1024; default_type application/json;
    location = /v1/models {{ return 200 '{{"object":"list","data":[{{"id":"tiny","object":"model"}}]}}'; }}
    location / {{ return 200 '{answer}'; }}
  }}
}}
"""
)
NGINX_PROXY = (
    NGINX_HEAD
    + """
  upstream origin {{ server 127.0.0.1:{origin}; keepalive 128; keepalive_requests 1000000000; }}
  server {{
    listen 127.0.0.1:{port} backlog=1024;
    location / {{ proxy_pass http://origin; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; }}
  }}
}}
"""
)
HAPROXY = """
global
  nbthread 1
  maxconn 4096
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
listen proxy
  bind 127.0.0.1:{port}
  http-reuse always
  server origin 127.0.0.1:{origin} pool-max-conn 256
"""
LLAMA_SWAP = """
models:
  tiny:
    proxy: http://127.0.0.1:{origin}
    cmd: sleep 100000
    checkEndpoint: none
    concurrencyLimit: 512
"""
LITELLM = """
model_list:
  - model_name: tiny
    litellm_params: {{model: openai/tiny, api_base: "http://127.0.0.1:{origin}/v1", api_key: none}}
"""
FLEET = """
devices: {{host: {{budget: 1GiB}}}}
models:
  tiny:
    engine: vllm
    external: "http://127.0.0.1:{origin}"
    options: {{model: tiny, gpu_memory_utilization: 0.1}}
    memory: 1MiB
    concurrency: 512
    queue: {{max: 4096}}
"""


@dataclass
class Proxy:
    """One participant: where it listens, and what was measured: connections -> [(requests/s, median latency in ms)].

    `cpu_us` is the processor time of each round per request, which a busy machine stretches less than the rate.
    """

    name: str
    port: int
    pid: int
    figures: dict[int, list[tuple[float, float]]] = field(default_factory=dict)
    cpu_us: list[float] = field(default_factory=list)

    def measure(self, connections: int, seconds: int, script: Path) -> None:
        """Send requests for so long, and note what came of it."""
        before = processor_s(self.pid)
        rate, latency_ms = wrk(self.port, connections, seconds, script)
        self.figures.setdefault(connections, []).append((rate, latency_ms))
        self.cpu_us.append((processor_s(self.pid) - before) / (rate * seconds) * 1e6)

    def rate(self, connections: int) -> float:
        """Return the median of requests per second."""
        return statistics.median(rate for rate, _ in self.figures[connections])

    def latency_ms(self, connections: int) -> float:
        """Return the median of the rounds' median latencies."""
        return statistics.median(latency for _, latency in self.figures[connections])


# -- participants --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def program(name: str, argv: list[str], port: int, folder: Path, startup_s: float = 20.0) -> Iterator[Proxy]:
    """Run a program until the end of the block; yields when it answers a chat question."""
    with (folder / f"{name}.out").open("wb") as log:
        process = subprocess.Popen(argv, stdout=log, stderr=log, cwd=Path(__file__).parents[1])
    try:
        wait_for_answer(name, port, lambda: process.poll() is None, startup_s)
        yield Proxy(name, port, process.pid)
    finally:
        process.terminate()
        process.wait(timeout=30)


def wait_for_answer(name: str, port: int, alive: Callable[[], bool], startup_s: float = 20.0) -> None:
    """Wait until a chat question is answered. Raises RuntimeError when it is not."""
    end = time.monotonic() + startup_s
    while time.monotonic() < end and alive():
        with contextlib.suppress(OSError, ValueError):
            if asyncio.run(ask_once(port)) == 200:
                return
        time.sleep(0.05)
    raise RuntimeError(f"{name} did not answer within {startup_s:g} s")


async def ask_once(port: int) -> int:
    """Return the status of one chat question."""
    async with asyncio.timeout(2):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Connection: close\r\nContent-Length: {len(QUESTION)}\r\n\r\n{QUESTION}".encode())
        line = await reader.readline()
        writer.close()
        return int(line.split()[1]) if line else 0


def write(folder: Path, name: str, text: str, **values: object) -> Path:
    """Write a configuration file from a template."""
    path = folder / name
    path.write_text(text.format(folder=folder, name=name, **values))
    return path


def participants(stack: contextlib.ExitStack, folder: Path, daemon: bool) -> list[Proxy]:
    """Start the origin and all proxies in front of it."""
    origin = free_port()
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    config = write(folder, "origin.conf", NGINX_ORIGIN, port=origin, answer=ANSWER)
    found = [stack.enter_context(program("origin", [nginx, "-c", str(config)], origin, folder))]

    def add(name: str, port: int, argv: list[str], startup_s: float = 20.0) -> None:
        found.append(stack.enter_context(program(name, argv, port, folder, startup_s)))

    port = free_port()
    config = write(folder, "nginx.conf", NGINX_PROXY, port=port, origin=origin)
    add("nginx", port, [nginx, "-c", str(config)])
    if haproxy := shutil.which("haproxy"):
        port = free_port()
        add("haproxy", port, [haproxy, "-f", str(write(folder, "haproxy.cfg", HAPROXY, port=port, origin=origin))])
    port = free_port()
    if daemon:
        fleet = stack.enter_context(RunningFleet(folder / "fleet", FLEET.format(origin=origin), port))
        wait_for_answer("fleetd", port, lambda: True)
        found.append(Proxy("fleetd run", port, fleet.pid))
    else:
        add("gateway", port, [sys.executable, "-m", "bench.proxies", "--serve", str(port), str(origin)])
    if swap := shutil.which("llama-swap"):
        port = free_port()
        config = write(folder, "swap.yaml", LLAMA_SWAP, origin=origin)
        add("llama-swap", port, [swap, "--config", str(config), "--listen", f"127.0.0.1:{port}"])
    if litellm := shutil.which("litellm"):
        port = free_port()
        config = write(folder, "litellm.yaml", LITELLM, origin=origin)
        add("litellm", port, [litellm, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)], 120.0)
    return found


def serve(port: int, origin: int) -> None:
    """Run the gateway on a fleet that has one model on one process and always room: the gateway's own cost, nothing else."""
    import gc

    import uvloop

    from fleetd.core.data.commands import Grant
    from fleetd.gateway import Gateway, GatewayOptions, ModelTarget, Upstream

    class OneModel:
        """A FleetPort without a fleet."""

        def __init__(self) -> None:
            self.only = ModelTarget(MODEL, "origin", Upstream("127.0.0.1", origin), MODEL)
            self.last = 0

        def take(self, _model: str) -> tuple[int, ModelTarget]:
            self.last += 1
            return self.last, self.only

        def admit(self, model: str, on_grant, _on_reject, _avoid=()):  # type: ignore[no-untyped-def]
            self.last += 1
            on_grant(Grant(self.last, model, "origin", 1))
            return self.last

        def cancel(self, request_id: int) -> None: ...

        def finish(self, request_id: int, failed: bool = False, refused: str = "") -> None: ...

        def target(self, _model: str, _process: str) -> ModelTarget:
            return self.only

        def models(self):  # type: ignore[no-untyped-def]
            return []

        def names(self):  # type: ignore[no-untyped-def]
            return {MODEL: MODEL}

        def ready(self):  # type: ignore[no-untyped-def]
            return True, ()

    async def run() -> None:
        await Gateway(OneModel(), GatewayOptions(port=port)).start()
        await asyncio.Event().wait()

    gc.freeze()
    uvloop.run(run())


# -- measuring -----------------------------------------------------------------------------------------------------------


def wrk(port: int, connections: int, seconds: int, script: Path) -> tuple[float, float]:
    """Return requests per second and the median latency in ms. Raises RuntimeError when answers were not 2xx."""
    argv = ["wrk", "-t1", f"-c{connections}", f"-d{seconds}s", "--latency", "-s", str(script)]
    argv.append(f"http://127.0.0.1:{port}/v1/chat/completions")
    text = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=seconds + 30).stdout
    if "Non-2xx" in text or "Socket errors" in text:
        raise RuntimeError(text)
    rate = re.search(r"Requests/sec:\s+([\d.]+)", text)
    half = re.search(r"50%\s+([\d.]+)(us|ms|s)", text)
    assert rate is not None, text
    assert half is not None, text
    return float(rate.group(1)), float(half.group(1)) * {"us": 0.001, "ms": 1.0, "s": 1000.0}[half.group(2)]


def processor_s(pid: int) -> float:
    """Return the processor time of a process and its children: nginx works in one."""
    process = psutil.Process(pid)
    times = [one.cpu_times() for one in (process, *process.children(recursive=True))]
    return sum(one.user + one.system for one in times)


def rss_mb(pid: int) -> float:
    """Return the resident memory of one process in MB."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1]) if Path("/proc").is_dir() else 0
    return pages * 4096 / 1e6


def report(proxies: list[Proxy], counts: list[int]) -> None:
    """Print the table."""
    base = next(proxy for proxy in proxies if proxy.name == "nginx")
    print(f"{'':12}" + "".join(f"{f'{count} connections':>34}" for count in counts) + f"{'CPU':>14}{'RSS':>9}")
    for proxy in proxies:
        cells = []
        for count in counts:
            rate = proxy.rate(count)
            cells.append(f"{rate:9.0f}/s {rate / base.rate(count):5.2f}x {proxy.latency_ms(count):7.3f} ms p50")
        cpu = f"{statistics.median(proxy.cpu_us):8.1f} us/req"
        print(f"{proxy.name:12}" + "".join(f"{cell:>34}" for cell in cells) + cpu + f"{rss_mb(proxy.pid):6.0f} MB")


def main() -> int:
    """Measure and print; 1 when the gateway is below `--at-least` of nginx anywhere."""
    parser = argparse.ArgumentParser(prog="python -m bench.proxies", description=__doc__)
    parser.add_argument("--serve", nargs=2, type=int, metavar=("PORT", "ORIGIN"), help=argparse.SUPPRESS)
    parser.add_argument("--daemon", action="store_true", help="measure `fleetd run` instead of the gateway alone")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=int, default=2)
    parser.add_argument("--connections", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--at-least", type=float, default=0.5, help="the ratio to nginx below which the exit code is 1")
    options = parser.parse_args()
    if options.serve:
        serve(*options.serve)
        return 0
    if missing := [
        name for name in ("wrk", "nginx") if not shutil.which(name, path="/usr/sbin:/usr/bin:/usr/local/bin")
    ]:
        print(f"needed and not on PATH: {', '.join(missing)}", file=sys.stderr)
        return 2
    with scratch("proxies") as folder, contextlib.ExitStack() as stack:
        (folder / "fleet").mkdir()
        script = folder / "post.lua"
        script.write_text(LUA)
        proxies = participants(stack, folder, options.daemon)
        for _ in range(options.rounds):
            for count in options.connections:
                for proxy in proxies:
                    proxy.measure(count, options.seconds, script)
        report(proxies, options.connections)
        base = next(proxy for proxy in proxies if proxy.name == "nginx")
        ours = next(proxy for proxy in proxies if proxy.name in ("gateway", "fleetd run"))
        return int(any(ours.rate(n) < options.at_least * base.rate(n) for n in options.connections))


if __name__ == "__main__":
    sys.exit(main())
