"""The reference pages of the HTTP API and the metrics: every route, error code, field and metric of the code is on its page."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from fleetd.control import routes as control_routes
from fleetd.control import wire
from fleetd.control.wire import DaemonStatus, FleetStatus
from fleetd.daemon.api.metrics import render
from fleetd.gateway import GatewayStats
from fleetd.gateway.errors import REJECT_STATUS
from fleetd.gateway.routes import MODELS_PREFIX, ROUTES

ROOT = Path(__file__).resolve().parents[2]
API = (ROOT / "docs" / "reference" / "http-api.md").read_text("utf-8")
METRICS = (ROOT / "docs" / "reference" / "metrics.md").read_text("utf-8")
DATA_PLANE, CONTROL = API.split("\n## Control API\n")


def routes_on(page: str) -> set[str]:
    return set(re.findall(r"^\| `((?:GET|POST) /[^`]*)` \|", page, re.MULTILINE))


def errors_on(page: str) -> set[tuple[int, str]]:
    return {(int(status), code) for status, code in re.findall(r"^\| (\d{3}) \| `(\w+)` \|", page, re.MULTILINE)}


def calls(*folders: str) -> Iterator[tuple[str, list[object]]]:
    """Yield (function, its constant arguments in order, None for others) of every call below some folders."""
    for folder in folders:
        for path in sorted((ROOT / "fleetd" / folder).rglob("*.py")):
            for node in ast.walk(ast.parse(path.read_text("utf-8"))):
                if isinstance(node, ast.Call):
                    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
                    yield name, [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]


def api_errors(*folders: str) -> set[tuple[object, object]]:
    return {(args[0], args[1]) for name, args in calls(*folders) if name == "ApiError" and isinstance(args[0], int)}


def test_data_plane_page_lists_every_route() -> None:
    known = {f"{route.method.decode()} {path.decode()}" for path, route in ROUTES.items()}
    assert routes_on(DATA_PLANE) == known | {f"GET {MODELS_PREFIX.decode()}{{id}}"}


def test_control_page_lists_every_route() -> None:
    known = set()
    for route in (*control_routes.fleet_routes(), *control_routes.library_routes()):
        known.add(f"{route.method} " + re.sub(r"\{(\w+):.*?\}(?=/|$)", r"{\1}", route.path))
    assert routes_on(CONTROL) == known | {"GET /metrics", "GET /v1/metrics"}


def test_data_plane_page_lists_every_error() -> None:
    invalid = {(args[1], args[2]) for name, args in calls("gateway") if name == "invalid_request" and len(args) == 3}
    rejects = {(status, code) for code, status in REJECT_STATUS.items()}
    assert errors_on(DATA_PLANE) == api_errors("gateway") | invalid | rejects | {(400, "invalid_request")}


def test_control_page_lists_every_error() -> None:
    documents = {args[0] for name, args in calls("control") if name == "error_document" and args and args[0]}
    raised = api_errors("control", "daemon")
    http = {
        (404, "unknown_route"),
        (405, "wrong_method"),
        (413, "body_too_large"),
    }  # answers.py, for aiohttp's own errors
    assert raised | http <= errors_on(CONTROL)
    assert {code for _, code in errors_on(CONTROL)} == documents | {code for _, code in raised | http}


DOCUMENTS = [
    wire.FleetStatus, wire.DaemonStatus, wire.HostStatus, wire.DeviceStatus, wire.ProcessStatus, wire.LastExit, wire.ModelStatus,
    wire.ProcessDetail, wire.ModelDetail, wire.FleetEvent, wire.LogLine, wire.Plan, wire.PlannedChange, wire.KeyChange,
    wire.ActionResult, wire.Applied,
]  # fmt: skip


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: document.__name__)
def test_control_page_lists_every_field(document: type) -> None:
    assert [key for key in document.__annotations__ if f"`{key}`" not in CONTROL and f'"{key}"' not in CONTROL] == []


def test_metrics_page_lists_every_metric() -> None:
    daemon: DaemonStatus = {
        "pid": 1, "version": "1", "uptime_s": 1.0, "config": "", "config_hash": "", "rss_bytes": 1,
    }  # fmt: skip
    status: FleetStatus = {"name": "f", "ready": True, "daemon": daemon, "devices": [], "processes": [], "models": []}
    text = render(status, GatewayStats(0, 0, 0, 0, 0, 0)).decode()
    known = set(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    assert set(re.findall(r"^\| `(\w+)` \| (\w+) \|", METRICS, re.MULTILINE)) == known
