"""The JSON of `pm2 jlist`, for scripts written for PM2."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

STATUS = {
    "READY": "online",
    "UNHEALTHY": "online",
    "DRAINING": "online",
    "STARTING": "launching",
    "BACKOFF": "waiting restart",
    "BLOCKED": "waiting restart",
    "STOPPING": "stopping",
    "FAILED": "errored",
}


def jlist(status: Mapping[str, Any], now: float) -> list[dict[str, Any]]:
    """Return one entry per process: {name, pid, pm_id, monit: {memory, cpu}, pm2_env: {…}}; times in milliseconds."""
    return [_entry(number, row, now) for number, row in enumerate(status["processes"])]


def _entry(number: int, row: Mapping[str, Any], now: float) -> dict[str, Any]:
    last = row.get("last_exit") or {}
    uptime_s = row.get("uptime_s")
    return {
        "pid": row.get("pid") or 0,
        "name": row["name"],
        "pm_id": number,
        "monit": {"memory": row.get("rss_bytes") or 0, "cpu": row.get("cpu_percent") or 0},
        "pm2_env": {
            "name": row["name"],
            "pm_id": number,
            "namespace": "default",
            "status": STATUS.get(str(row.get("state")), "stopped"),
            "pm_uptime": int((now - uptime_s) * 1000) if uptime_s is not None else 0,
            "restart_time": row.get("restarts") or 0,
            "unstable_restarts": 0,
            "exit_code": last.get("code"),
            "exec_mode": "fork_mode",
            "instances": 1,
            "autorestart": row.get("desired") == "up",
            "PORT": row.get("port"),
        },
    }
