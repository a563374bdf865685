"""`--api vllm`: connection refused until ready, sleep and wake, metrics, and the log lines of a start.

Copied from vLLM: /health returns 200 while asleep; a request to a sleeping engine is accepted and never answered; a second
/sleep succeeds and does nothing; /wake_up with a tag that does not sleep succeeds; a plain /wake_up after level 2 succeeds
and the model then generates garbage; these routes exist only with VLLM_SERVER_DEV_MODE=1.
"""

from __future__ import annotations

import os
import socket
import threading
import time

from fake_http import Exchange
from fake_openai import OpenAI
from fake_state import State, log


class VLLM(OpenAI):
    """One model, refused by name when it is another's."""

    def __init__(self, state: State) -> None:
        super().__init__(state)
        self.listener: socket.socket | None = None
        self.dev = os.environ.get("VLLM_SERVER_DEV_MODE") == "1"
        self.level = 0
        self.asleep: set[str] = set()
        self.weights_lost = False

    def start(self) -> bool:
        if not self.args.load_time and not self.args.fail_load:
            self._load()
            return True
        threading.Thread(target=self._load_then_listen, daemon=True).start()
        return False

    def _load_then_listen(self) -> None:
        self._load()
        assert self.listener is not None
        self.listener.listen(1024)

    def fail_load(self) -> None:
        log("ERROR 08-01 12:00:00 [core.py:700] ValueError: No available memory for the cache blocks.")
        log(
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
        )
        os._exit(0 if self.args.exit_zero_on_death else self.args.exit_code)

    def announce(self) -> None:
        prefix, seconds = "INFO 08-01 12:00:00 [fake.py:1]", self.args.load_time
        gib = self.args.memory / 2**30
        log(f"{prefix} Loading weights took {seconds / 2:.2f} seconds")
        log(f"{prefix} Model loading took {gib:.4f} GiB memory and {seconds / 2:.6f} seconds")
        log(f"{prefix} Available KV cache memory: 1.00 GiB")
        log(f"{prefix} Graph capturing finished in 0 secs, took 0.10 GiB")
        log(f"{prefix} init engine (profile, create kv cache, warmup model) took {seconds / 2:.2f} seconds")
        log("INFO:     Application startup complete.")

    def knows(self, model: str) -> bool:
        return model == self.args.model

    def health(self, exchange: Exchange) -> None:
        exchange.send(200)

    def unknown(self, exchange: Exchange) -> None:
        exchange.send(404, {"detail": "Not Found"})

    def prepare(self, exchange: Exchange, body: object) -> bool:
        while self.asleep:  # accepted, queued, silent
            exchange.wait(0.02)
        return True

    def text(self, word: str) -> str:
        return "!!!!" if self.weights_lost else word

    def extra(self, exchange: Exchange) -> bool:
        path, method = exchange.path, exchange.method
        if path == "/ping":
            exchange.send(200)
        elif path == "/version":
            exchange.send(200, {"version": self.args.version})
        elif path == "/load":
            exchange.send(200, {"server_load": self.state.in_flight})
        elif path == "/metrics":
            self.metrics(exchange)
        elif self.dev and path == "/is_sleeping" and method == "GET":
            exchange.send(200, {"is_sleeping": bool(self.asleep)})
        elif self.dev and path == "/sleep" and method == "POST":
            self.sleep(exchange)
        elif self.dev and path == "/wake_up" and method == "POST":
            self.wake_up(exchange)
        elif self.dev and path == "/collective_rpc" and method == "POST":
            if exchange.json().get("method") == "reload_weights" and "weights" not in self.asleep:
                self.weights_lost = False
            exchange.send(200, {"results": [None]})
        elif self.dev and path in ("/reset_prefix_cache", "/pause", "/resume"):
            exchange.send(200)
        else:
            return False
        return True

    def metrics(self, exchange: Exchange) -> None:
        labels = f'{{engine="0",model_name="{self.args.model}"}}'
        stats = self.state.stats()
        state = ("awake", "weights_offloaded", "discard_all")[self.level if self.asleep else 0]
        lines = [
            f"vllm:num_requests_running{labels} {stats['in_flight']}",
            f"vllm:num_requests_waiting{labels} {stats['waiting']}",
            f"vllm:kv_cache_usage_perc{labels} 0.0",
            f'vllm:request_success_total{{finished_reason="stop",{labels[1:]} {stats["finished"]}',
            f'vllm:engine_sleep_state{{sleep_state="{state}",{labels[1:]} 1',
        ]
        exchange.send(200, "\n".join(lines) + "\n", "text/plain; version=0.0.4")

    def sleep(self, exchange: Exchange) -> None:
        level = exchange.query.get("level", ["1"])[0]
        mode = exchange.query.get("mode", ["abort"])[0]
        if level not in ("0", "1", "2"):
            return self.error(exchange, 400, "level: Input should be 0, 1 or 2", "BadRequestError")
        if self.args.fail_sleep:
            return self.error(exchange, 500, "freed memory is negative", "InternalServerError")
        if not self.asleep:
            if mode == "abort":
                self.state.epoch += 1
            while mode == "wait" and self.state.in_flight:
                time.sleep(0.01)
            self.level = int(level)
            self.asleep = {"scheduling"} | ({"weights", "kv_cache"} if self.level else set())
            self.weights_lost = self.level == 2
            if self.level:
                self.state.release("model")
        exchange.send(200, {"status": "sleeping", "level": int(level)})
        return None

    def wake_up(self, exchange: Exchange) -> None:
        if self.args.hang_wake:
            log("fake: /wake_up hangs")
            exchange.hang()
        tags = set(exchange.query.get("tags", ["weights", "kv_cache", "scheduling"]))
        if "weights" in tags and "weights" in self.asleep:
            self.state.take("model", self.args.memory if not self.args.orphan_worker else 0)
        for tag in tags - self.asleep:
            log(f"WARNING 08-01 12:00:00 [abstract.py:420] Tag {tag} is not in sleeping tags set()")
        self.asleep -= tags
        if not self.asleep & {"weights", "kv_cache"}:
            self.asleep.clear()
        exchange.send(200, {"status": "sleeping" if self.asleep else "awake", "tags": sorted(tags)})
