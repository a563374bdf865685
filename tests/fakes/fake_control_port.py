"""A small in-memory fleet that implements ControlPort, and a program that serves it on a socket.

The names of its processes select their behavior: `web` and `ollama-1…2` work, `broken` fails to start, `slow` never
becomes ready.
"""

from __future__ import annotations

import asyncio
import re
import signal
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from fleetd.control.port import ActOptions, ApplyOptions, Names
from fleetd.control.server import ControlServer
from fleetd.control.wire import (
    ActionResult,
    Applied,
    DeviceStatus,
    FleetEvent,
    FleetStatus,
    KeyChange,
    LogLine,
    ModelDetail,
    ModelStatus,
    Plan,
    PlannedChange,
    ProcessDetail,
    ProcessStatus,
    rfc3339,
)
from fleetd.errors import ApiError, CapacityError, ConfigError, EngineError, HostError, Problem

GIB = 1024**3
EPOCH = 1_790_000_000.0


def process(name: str, state: str = "READY", **changes: Any) -> ProcessStatus:
    running = state in ("READY", "STARTING", "UNHEALTHY", "DRAINING")
    row: dict[str, Any] = {
        "name": name,
        "kind": "service",
        "engine": None,
        "state": state,
        "desired": "up",
        "reason": "the startup probe answered",
        "pid": 4711 if running else None,
        "generation": 1,
        "port": 3000,
        "restarts": 0,
        "uptime_s": 3725.0 if running else None,
        "cpu_percent": 1.5 if running else None,
        "rss_bytes": 52 * 1024**2 if running else None,
        "next_start_s": None,
        "last_exit": None,
    }
    return cast("ProcessStatus", row | changes)


def model(name: str, state: str = "LOADED", **changes: Any) -> ModelStatus:
    row: dict[str, Any] = {
        "name": name,
        "state": state,
        "engine": "ollama",
        "instances": ["ollama-1"] if state == "LOADED" else [],
        "device_bytes": {"gpu0": 3 * GIB, "host": GIB} if state == "LOADED" else {},
        "footprint": "learned",
        "pinned": False,
        "priority": 0,
        "in_flight": 1,
        "queued": 2,
        "loads": 3,
        "evictions": 1,
        "last_used": rfc3339(EPOCH),
        "ttl_left_s": 42.0 if state == "LOADED" else None,
        "load_s": 1.25,
        "ttl_s": 600.0,
        "context_length": 4096,
        "aliases": ["gpt-3.5-turbo"] if name == "ulysses" else [],
    }
    return cast("ModelStatus", row | changes)


class FakePort:
    """ControlPort without a daemon. `acted` records what was asked; `raising` is raised by every status()."""

    def __init__(self) -> None:
        crash = {"code": 1, "signal": None, "oom": False, "at": rfc3339(EPOCH), "reason": "cannot find module x"}
        self.rows = {
            "web": process("web"),
            "ollama-1": process("ollama-1", kind="instance", engine="ollama", base="ollama", port=11434),
            "ollama-2": process("ollama-2", kind="instance", engine="ollama", base="ollama", port=11435),
            "broken": process("broken", "FAILED", reason="gave up after 5 deaths in 1m", restarts=5, last_exit=crash),
            "slow": process("slow", "STARTING"),
        }
        self.residency = {"ulysses": model("ulysses"), "org/coder:7b": model("org/coder:7b", "ABSENT")}
        self.acted: list[tuple[str, tuple[str, ...], ActOptions]] = []
        self.applied: list[tuple[str | None, ApplyOptions]] = []
        self.raising: Exception | None = None
        self.config_error: str | None = None
        self.stopped = asyncio.Event()
        self.closed_streams = 0
        self.calls: list[str] = []

    async def status(self) -> FleetStatus:
        if self.raising is not None:
            raise self.raising
        return {
            "name": "box",
            "ready": True,
            "daemon": {
                "pid": 1,
                "version": "0.1.0",
                "uptime_s": 90061.0,
                "config": "/etc/fleetd/fleet.yaml",
                "config_hash": "abc123",
                "rss_bytes": 50 * 1024**2,
                "config_error": self.config_error,
            },
            "devices": list(self.devices()),
            "processes": list(self.rows.values()),
            "models": list(self.residency.values()),
        }

    def devices(self) -> Sequence[DeviceStatus]:
        return [
            {
                "name": "gpu0",
                "kind": "gpu",
                "total_bytes": 16 * GIB,
                "budget_bytes": 13 * GIB,
                "reserved_bytes": 3 * GIB,
                "used_bytes": 4 * GIB,
                "utilization": 0.5,
                "temperature_c": 61.0,
            }
        ]

    def names(self) -> Names:
        return Names(
            {name: row.get("base", name) for name, row in self.rows.items()},
            {name: tuple(row.get("aliases", [])) for name, row in self.residency.items()},
        )

    def _event(self, number: int, name: str) -> FleetEvent:
        return {
            "seq": number,
            "at": rfc3339(EPOCH + number),
            "kind": "process",
            "name": name,
            "event": "exited",
            "reason": "code 1",
            "before": "READY",
            "state": "BACKOFF",
        }

    def process(self, name: str) -> ProcessDetail:
        if name not in self.rows:
            raise ApiError(404, "unknown_name", f"There is no process named {name!r}.")
        return {
            "process": self.rows[name],
            "models": [m for m in self.residency.values() if name in m["instances"]],
            "events": [self._event(n, name) for n in range(3)],
            "log": [{"name": name, "at": None, "line": f"line {n}", "stream": None} for n in range(3)],
            "command": ["node", "index.js"],
            "cwd": "/srv/bot",
            "log_path": f"/var/log/{name}.log",
            "source": "fleet.yaml:3",
        }

    def model(self, name: str) -> ModelDetail:
        found = next((m for key, m in self.residency.items() if name == key or name in m.get("aliases", [])), None)
        if found is None:
            raise ApiError(404, "unknown_name", f"There is no model named {name!r}.")
        return {"model": found, "events": [self._event(1, name)], "source": "fleet.yaml:9"}

    async def act(self, verb: str, names: Sequence[str], options: ActOptions) -> Sequence[ActionResult]:
        self.acted.append((verb, tuple(names), options))
        if not options.wait:
            return [{"name": n, "result": "accepted", "state": None, "reason": None} for n in names]
        outcomes: list[ActionResult] = []
        for name in names:
            if name == "slow":
                await asyncio.sleep(options.timeout_s)
                outcomes.append({"name": name, "result": "timeout", "state": "STARTING", "reason": "not ready yet"})
            elif name == "broken":
                outcomes.append({"name": name, "result": "failed", "state": "FAILED", "reason": "exit code 1"})
            elif name == "org/coder:7b":
                raise CapacityError("org/coder:7b needs 30 GiB, gpu0 has a budget of 13 GiB.")
            else:
                outcomes.append({"name": name, "result": "ok", "state": "READY", "reason": None})
        return outcomes

    async def events(self, since_s: float | None, after: int | None, follow: bool) -> AsyncIterator[FleetEvent]:
        try:
            number = 0 if after is None else after + 1
            while number < 5 or follow:
                yield self._event(number, "web")
                number += 1
                if number >= 5:
                    await asyncio.sleep(0.02)
        finally:
            self.closed_streams += 1

    async def logs(
        self, names: Sequence[str], lines: int, since_s: float | None, grep: str | None, follow: bool
    ) -> AsyncIterator[LogLine]:
        try:
            number = 0
            while number < min(lines, 1000) or follow:
                for name in names:
                    line = f"{name} says {number} \x1b[31mred\x1b[0m" + ("\udcff" if number == 1 else "")
                    if grep is None or re.search(grep, line):
                        yield {"name": name, "at": None, "line": line, "stream": None}
                number += 1
                if follow and number >= lines:
                    await asyncio.sleep(0.02)
        finally:
            self.closed_streams += 1

    def story(self, name: str) -> Sequence[FleetEvent]:
        if name not in self.rows and name not in self.residency:
            raise ApiError(404, "unknown_name", f"Nothing is named {name!r}.")
        return [self._event(n, name) for n in range(4)]

    def explain(self, model: str) -> Mapping[str, Any]:
        detail = self.model(model)["model"]
        return {
            "model": detail["name"],
            "state": detail["state"],
            "reason": "a request wanted it",
            "footprint": {"source": "learned", "bytes": {"gpu0": 3 * GIB}},
            "devices": [{"name": "gpu0", "budget_bytes": 13 * GIB, "reserved_bytes": 3 * GIB, "free_bytes": 10 * GIB}],
            "holders": [{"name": "ollama-1", "state": "READY", "reason": "holds it"}],
            "victims": [],
            "text": ["ulysses is loaded on ollama-1 since a request wanted it."],
        }

    async def dump(self) -> Mapping[str, Any]:
        return {
            "status": await self.status(),
            "journal": [self._event(n, "web") for n in range(3)],
            "nan": float("nan"),
        }

    def config(self) -> Mapping[str, Any]:
        return {"file": "/etc/fleetd/fleet.yaml", "config_hash": "abc123", "config": {"version": 1}}

    async def plan(self, path: str | None, text: str | None) -> Plan:
        content = text if text is not None else Path(path).read_text("utf-8") if path else "same"
        if "bad" in content:
            problems = [
                Problem(path or "fleet.yaml", 4, 7, "services.x.port", 'cannot read "x" as a port', "port: x"),
                Problem(path or "fleet.yaml", 9, 1, "modles", "unknown key; did you mean models?"),
            ]
            raise ConfigError(problems)
        if "same" in content:
            return {"file": path, "config_hash": "abc123", "changes": [], "unchanged": 5}
        key: KeyChange = {"path": "services.web.env.A", "before": "1", "after": "2", "effect": "restart"}
        changes: list[PlannedChange] = [
            {"kind": "service", "name": "new", "change": "add", "effect": "start", "keys": []},
            {"kind": "service", "name": "web", "change": "change", "effect": "restart", "keys": [key]},
            {"kind": "instance", "name": "old", "change": "remove", "effect": "stop", "keys": []},
        ]
        return {"file": path, "config_hash": "def456", "changes": changes, "unchanged": 3}

    async def apply(self, path: str | None, options: ApplyOptions) -> Applied:
        plan = await self.plan(path, None)
        if path and path.endswith("locked.yaml"):
            raise ApiError(409, "locked", "Locked by pid 42 since 10:00.")
        self.applied.append((path, options))
        results: list[ActionResult] = [
            {"name": c["name"], "result": "ok", "state": "READY", "reason": None} for c in plan["changes"]
        ]
        return {"plan": plan, "results": [] if options.dry_run else results}

    async def reload(self) -> Applied:
        return await self.apply(None, ApplyOptions(wait=False))

    async def reexec(self) -> None:
        self.calls.append("reexec")

    async def shutdown(self, force: bool) -> None:
        self.calls.append(f"shutdown force={force}")
        asyncio.get_running_loop().call_later(0.05, self.stopped.set)


FAILURES: dict[str, Exception] = {
    "engine": EngineError("ollama refused", hint="look at its log"),
    "host": HostError("disk full"),
    "busy": ApiError(503, "draining", "Shutting down.", retry_after_s=500),
    "bug": RuntimeError("secret detail"),
}


async def serve(path: Path) -> None:
    """Serve a FakePort at `path` until SIGTERM or a shutdown; print `ready` once it answers."""
    port = FakePort()
    server = ControlServer(port, path)
    await server.start()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, port.stopped.set)
    print("ready", flush=True)
    await port.stopped.wait()
    await server.close()


if __name__ == "__main__":
    asyncio.run(serve(Path(sys.argv[1])))
