"""Render the status of the fleet as Prometheus text.

Invariants:
- Rendered in a thread from values, without access to the fleet.
- Names end in their unit; a label is a name of the fleet, never data from a client.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fleetd.control.wire import FleetStatus
    from fleetd.gateway.listener import GatewayStats

_PROCESS_STATES = (
    "STOPPED",
    "STARTING",
    "READY",
    "UNHEALTHY",
    "DRAINING",
    "STOPPING",
    "BACKOFF",
    "EXITED",
    "FAILED",
    "BLOCKED",
)
_MODEL_STATES = ("ABSENT", "LOADING", "LOADED", "ASLEEP", "UNLOADING", "FAILED")


class Page:
    """Text in Prometheus' exposition format."""

    def __init__(self) -> None:
        self._lines: list[str] = []

    def metric(
        self, name: str, kind: str, what: str, samples: Iterable[tuple[Mapping[str, str], float | int | None]]
    ) -> None:
        self._lines += [f"# HELP {name} {what}", f"# TYPE {name} {kind}"]
        for labels, value in samples:
            if value is not None:
                inner = ",".join(f'{key}="{escaped(text)}"' for key, text in labels.items())
                self._lines.append(f"{name}{{{inner}}} {value}" if inner else f"{name} {value}")

    def bytes(self) -> bytes:
        return ("\n".join(self._lines) + "\n").encode()


def escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def render(status: FleetStatus, gateway: GatewayStats) -> bytes:
    """Return the page."""
    page = Page()
    daemon = status["daemon"]
    page.metric(
        "fleetd_info", "gauge", "Version of the daemon.", [({"version": daemon["version"], "name": status["name"]}, 1)]
    )
    page.metric("fleetd_ready", "gauge", "1 when the fleet is in its desired state.", [({}, int(status["ready"]))])
    page.metric("fleetd_uptime_seconds", "gauge", "Time since the daemon started.", [({}, daemon["uptime_s"])])
    page.metric("fleetd_resident_memory_bytes", "gauge", "Resident memory of the daemon.", [({}, daemon["rss_bytes"])])
    _devices(page, status)
    _processes(page, status)
    _models(page, status)
    page.metric("fleetd_gateway_connections", "gauge", "Open client connections.", [({}, gateway.connections)])
    page.metric("fleetd_gateway_active_requests", "gauge", "Requests in progress.", [({}, gateway.active)])
    page.metric("fleetd_gateway_requests_total", "counter", "Requests received.", [({}, gateway.requests)])
    page.metric(
        "fleetd_gateway_upstream_connections",
        "gauge",
        "Open connections to engines.",
        [({}, gateway.upstream_connections)],
    )
    page.metric(
        "fleetd_gateway_buffered_bytes", "gauge", "Request bodies held in memory.", [({}, gateway.buffered_bytes)]
    )
    return page.bytes()


def _devices(page: Page, status: FleetStatus) -> None:
    rows = status["devices"]
    for key, what in (
        ("total_bytes", "Memory of the device."),
        ("budget_bytes", "Budget of the fleet on the device."),
        ("reserved_bytes", "Memory reserved by the fleet on the device."),
        ("used_bytes", "Memory used on the device by all processes."),
    ):
        page.metric(
            f"fleetd_device_{key}", "gauge", what, [({"device": row["name"]}, _number(row, key)) for row in rows]
        )
    page.metric(
        "fleetd_device_utilization_ratio",
        "gauge",
        "Load of the device.",
        [({"device": row["name"]}, row["utilization"]) for row in rows],
    )
    page.metric(
        "fleetd_device_temperature_celsius",
        "gauge",
        "Temperature.",
        [({"device": row["name"]}, row["temperature_c"]) for row in rows],
    )


def _processes(page: Page, status: FleetStatus) -> None:
    rows = status["processes"]
    page.metric(
        "fleetd_process_state",
        "gauge",
        "1 for the state that a process is in.",
        [
            ({"process": row["name"], "state": state}, int(row["state"] == state))
            for row in rows
            for state in _PROCESS_STATES
        ],
    )
    page.metric(
        "fleetd_process_restarts_total",
        "counter",
        "Restarts since it was first started.",
        [({"process": row["name"]}, row["restarts"]) for row in rows],
    )
    page.metric(
        "fleetd_process_resident_memory_bytes",
        "gauge",
        "Resident memory of the whole process set.",
        [({"process": row["name"]}, row["rss_bytes"]) for row in rows],
    )
    page.metric(
        "fleetd_process_cpu_percent",
        "gauge",
        "Processor time; 100 is one core.",
        [({"process": row["name"]}, row["cpu_percent"]) for row in rows],
    )


def _models(page: Page, status: FleetStatus) -> None:
    rows = [row for row in status["models"] if row["state"] != "ROUTE"]
    page.metric(
        "fleetd_model_state",
        "gauge",
        "1 for the state that a model is in.",
        [
            ({"model": row["name"], "state": state}, int(row["state"] == state))
            for row in rows
            for state in _MODEL_STATES
        ],
    )
    for key, kind, name, what in (
        ("in_flight", "gauge", "in_flight", "Requests being answered."),
        ("queued", "gauge", "queued", "Requests that wait."),
        ("loads", "counter", "loads_total", "Loads since the daemon started."),
        ("evictions", "counter", "evictions_total", "Unloads to make room for another model."),
        ("load_s", "gauge", "load_seconds", "Duration of the last load."),
        ("sleeps", "counter", "sleeps_total", "Sleeps to free memory for another model."),
        ("wakes", "counter", "wakes_total", "Wakes since the daemon started."),
        ("wake_s", "gauge", "wake_seconds", "Duration of the last wake."),
    ):
        page.metric(f"fleetd_model_{name}", kind, what, [({"model": row["name"]}, _number(row, key)) for row in rows])
    page.metric(
        "fleetd_model_reserved_bytes",
        "gauge",
        "Memory reserved per device.",
        [
            ({"model": row["name"], "device": device}, size)
            for row in rows
            for device, size in row["device_bytes"].items()
        ],
    )


def _number(row: Any, key: str) -> float | int | None:
    value = row.get(key)
    return value if isinstance(value, int | float) else None
