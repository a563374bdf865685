#!/usr/bin/env python3
"""A fake model server: the API of an engine, real memory, and all failures that engines show.

    python tests/fakes/fake_model_server.py --api vllm --port 8001 --load-time 0.2 --memory 50000000 --orphan-worker

It uses the standard library only and listens 40 ms after its start. It can replace an engine's own program: unknown flags
are ignored, and `--alias`, `--served-model-name`, `--parallel`, `OLLAMA_HOST` and similar ones are understood.
`GET /fake/stats` returns counters: requests, in_flight, max_in_flight, aborted, held_bytes, workers.
"""

# os.path, since pathlib would double the start-up time.
# ruff: noqa: PTH100, PTH120

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from argparse import ArgumentParser, Namespace

from fake_http import Exchange, bind, serve
from fake_state import State, log

APIS = ("openai", "llamacpp", "vllm", "ollama", "lmstudio")


def crash_limit(text: str) -> tuple[str, float]:
    """Read `3`, `3 requests` or `1.5s`."""
    word = text.strip().lower()
    if word.endswith("s") and not word.endswith("requests"):
        return "seconds", float(word[:-1])
    return "requests", int(word.removesuffix("requests").strip())


def parse(argv: list[str]) -> Namespace:
    parser = ArgumentParser(description="fake model server", allow_abbrev=False)
    add = parser.add_argument
    add("--api", choices=APIS, default="openai")
    add("--host", "-H")
    add("--port", type=int, default=0, help="0: any free port, printed in the first log line")
    add("--model", "-m", default="fake", help="name of the served model")
    add("--alias", "-a", "--served-model-name", dest="alias")
    add("--models", default="", help="ollama, lmstudio: models in the store, `a,b=BYTES`")
    add("--load-time", type=float, default=0.0, help="seconds until ready; ollama, lmstudio: per load of a model")
    add("--unload-time", type=float, default=0.03, help="ollama: seconds between the answer to an unload and its end")
    add("--tps", type=float, default=0.0, help="tokens per second; 0: at once")
    add("--tokens", type=int, default=8, help="tokens of a full answer")
    add("--crash-after", type=crash_limit, metavar="N|Ns", help="die on request N+1, or after N seconds")
    add("--crash-mid-stream", action="store_true", help="--crash-after N dies half-way through request N+1")
    add("--exit-code", type=int, default=1)
    add("--exit-zero-on-death", action="store_true")
    add("--ignore-term", action="store_true")
    add("--term-delay", type=float, default=0.0, help="seconds between SIGTERM and the exit")
    add("--hang", action="store_true", help="accept, never answer")
    add("--hang-after", type=int, metavar="N", help="inference hangs after N requests; /health stays well")
    add("--memory", type=int, default=0, help="bytes really held (ollama, lmstudio: per loaded model)")
    add("--orphan-worker", action="store_true", help="a child holds the memory and survives SIGKILL of the leader")
    add("--orphan-setsid", action="store_true", help="the worker leads a session of its own")
    add("--fail-load", action="store_true")
    add("--version", default="0.33.0", help="ollama, vllm: what it says of itself")
    add("--garbage", action="store_true", help="inference is answered with bytes that are not HTTP")
    add("--rst-mid-stream", action="store_true")
    add("--error-after", type=int, metavar="N", help="ollama: a stream breaks off with an error line after N words")
    add(
        "--slots",
        nargs="?",
        type=int,
        default=0,
        help="requests at once; 0: no limit (bare, it is llama-server's own flag)",
    )
    add(
        "--parallel",
        "-np",
        "--max-num-seqs",
        dest="parallel",
        type=int,
        default=0,
        help="the engines' names for --slots",
    )
    add("--fail-sleep", action="store_true", help="vllm: /sleep returns 500 and leaves an unknown state")
    add("--hang-wake", action="store_true", help="vllm: /wake_up is never answered")
    add("--busy", action="store_true", help="ollama: every request that needs a load gets 503 server busy")
    args, _ = parser.parse_known_args(argv)
    args.model = args.alias or args.model
    args.slots = args.slots or args.parallel
    kind, limit = args.crash_after or ("", None)
    args.crash_after_requests = limit if kind == "requests" else None
    args.crash_after_seconds = limit if kind == "seconds" else None
    if args.api == "ollama" and (host := os.environ.get("OLLAMA_HOST")):
        name, _, port = host.rpartition("://")[2].rpartition(":")
        args.host, args.port = args.host or name.strip("[]"), args.port or int(port)
    args.host = args.host or "127.0.0.1"
    return args


def dialect(state: State) -> Any:
    api = state.args.api
    if api == "vllm":
        from fake_vllm import VLLM

        return VLLM(state)
    if api == "ollama":
        from fake_ollama import Ollama

        return Ollama(state)
    if api == "lmstudio":
        from fake_lmstudio import LMStudio

        return LMStudio(state)
    import fake_openai

    return fake_openai.LlamaCpp(state) if api == "llamacpp" else fake_openai.OpenAI(state)


def install_signals(state: State) -> None:
    def on_term(number: int, frame: object) -> None:
        log(f"fake: got signal {number}, stopping")
        time.sleep(state.args.term_delay)
        for pid in state.workers:
            os.kill(pid, signal.SIGTERM)
        os._exit(0)

    handler: Any = signal.SIG_IGN if state.args.ignore_term else on_term
    signal.signal(signal.SIGTERM, handler)
    signal.signal(signal.SIGINT, handler)


def main() -> None:
    args = parse(sys.argv[1:])
    state = State(args)
    install_signals(state)
    try:
        listener = bind(args.host, args.port)
    except OSError as error:
        log(f"Error: listen tcp {args.host}:{args.port}: bind: {(error.strerror or 'failed').lower()}")
        sys.exit(1)
    args.port = listener.getsockname()[1]
    log(f"fake: {args.api} pid {os.getpid()} port {args.port}")
    if args.crash_after_seconds is not None:
        timer = threading.Timer(args.crash_after_seconds, state.die, [f"crash after {args.crash_after_seconds} s"])
        timer.daemon = True
        timer.start()
    spoken = dialect(state)
    spoken.listener = listener
    if spoken.start():
        listener.listen(1024)

    def handle(exchange: Exchange) -> None:
        if exchange.path == "/fake/stats":
            return exchange.send(200, state.stats())
        if args.hang:
            exchange.hang()
        spoken.handle(exchange)
        return None

    while not listener.getsockopt(1, 30):  # SOL_SOCKET, SO_ACCEPTCONN: vllm listens late
        time.sleep(0.002)
    serve(listener, handle)


if __name__ == "__main__":
    main()
