"""Convert when PM2 starts, restarts and stops an app: restart policy, crash loops, schedules, stop, readiness.

Invariants:
- PM2 gives up after `max_restarts` runs in a row below `min_uptime`; a run that lasted is never part of a crash loop.
- A number beyond the limits of fleet.yaml is clamped and reported.
"""

from __future__ import annotations

import math
from typing import Any

from fleetd.config.importers.pm2.app import Pm2App
from fleetd.config.importers.pm2.program import is_node, main_file, says_ready
from fleetd.config.importers.pm2.values import duration, milliseconds
from fleetd.config.schema.process import Cron

MINUTE_MS, HOUR_MS, DAY_MS = 60_000, 3_600_000, 86_400_000
_MAX_RESTARTS, _MIN_UPTIME_MS = 16, 1000  # PM2's own
_MAX_DEATHS = 100_000
_MAX_WINDOW_MS = 30 * DAY_MS
_NICKNAMES = {
    "@yearly": "0 0 1 1 *", "@annually": "0 0 1 1 *", "@monthly": "0 0 1 * *", "@weekly": "0 0 * * 0", "@daily": "0 0 * * *",
    "@midnight": "0 0 * * *", "@hourly": "0 * * * *",
}  # fmt: skip


def time_ms(app: Pm2App, field: str, highest: int, lowest: int = 1) -> int | None:
    """Read a time in milliseconds, inside the limits of fleet.yaml; None: not set, or no time."""
    said = app.take(field)
    value = milliseconds(said)
    if value is None and said is not None:
        app.refused(field, f"{said!r} is no time")
    return app.clamped(field, value, lowest, highest, duration) if value else None


def restart(app: Pm2App) -> None:
    keys: dict[str, Any] = {}
    codes = app.take("stop_exit_codes")
    app.ends = app.take("autorestart") in (False, "false")
    if app.ends:
        keys["policy"] = "never"
        app.mapped("autorestart", "restart.policy: never")
    elif codes is not None:
        said = [int(code) for code in (codes if isinstance(codes, list) else [codes]) if str(code).isdigit()]
        listed = [code for code in said if code <= 255]
        keys |= {"policy": "on-failure", "success_codes": listed}
        app.mapped("stop_exit_codes", f"restart.success_codes: {listed}")
        app.ends = True
    delayed = _backoff(app, keys)
    uptime, most = time_ms(app, "min_uptime", 365 * DAY_MS), app.take("max_restarts")
    if keys.get("policy") == "never":
        _useless(app, uptime, most)
    elif not app.is_instance or uptime is not None or most is not None:
        _crash_loop(app, keys, uptime, most, delayed=delayed)
    if keys:
        app.entry["restart"] = keys
    if app.take("autostart") in (False, "false"):
        app.entry["enabled"] = False
        app.mapped("autostart", "enabled: false")


def _useless(app: Pm2App, uptime: int | None, most: Any) -> None:
    for field, value in (("min_uptime", uptime), ("max_restarts", most)):
        if value is not None:
            app.refused(field, "it is never restarted: there is no crash loop")


def _backoff(app: Pm2App, keys: dict[str, Any]) -> bool:
    """Convert the delay before a restart; return whether there is one."""
    fixed, growing = time_ms(app, "restart_delay", DAY_MS), time_ms(app, "exp_backoff_restart_delay", DAY_MS)
    if growing:
        keys["backoff"] = {"initial": duration(growing), "factor": 1.5, "max": duration(max(growing, 15_000))}
        app.mapped("exp_backoff_restart_delay", "restart.backoff")
    elif fixed:
        keys["backoff"] = {"initial": duration(fixed), "factor": 1, "max": duration(fixed), "jitter": 0}
        app.mapped("restart_delay", "restart.backoff with factor 1")
    return bool(growing or fixed)


def _crash_loop(app: Pm2App, keys: dict[str, Any], uptime: int | None, most: Any, *, delayed: bool) -> None:
    """Convert PM2's limit: `max_restarts` runs below `min_uptime`, within the time that so many runs can take."""
    shortest = uptime or _MIN_UPTIME_MS
    count = _MAX_RESTARTS
    if isinstance(most, int | str) and str(most).isdigit() and int(most) > 0:
        count = int(app.clamped("max_restarts", int(most), 1, _MAX_DEATHS, str))
        app.mapped("max_restarts", f"restart.crash_loop.count: {count}")
    elif most is not None:
        app.refused("max_restarts", f"{most!r} is no count of deaths: PM2's default of {_MAX_RESTARTS} is written")
    if uptime:
        app.mapped("min_uptime", f"restart.crash_loop.min_uptime: {duration(uptime)}")
    # PM2 counts for count * min_uptime after a start. Without a delay of its own an app has fleetd's growing backoff, which takes longer.
    window = count * shortest
    if not delayed:
        window = math.ceil((window + _backoff_ms(count)) / MINUTE_MS) * MINUTE_MS
    window = min(max(window, 100), _MAX_WINDOW_MS)
    keys["stable_after"] = duration(shortest)
    keys["crash_loop"] = {"count": count, "window": duration(window), "min_uptime": duration(shortest)}


def _backoff_ms(count: int) -> int:
    """Return how long the default backoffs between `count` deaths take at most."""
    growing = [min(60.0, 0.5 * 2.0**death) for death in range(min(count - 1, 7))]
    return round((sum(growing) + 60.0 * max(0, count - 8)) * 1250)


def stop(app: Pm2App) -> None:
    keys: dict[str, Any] = {} if app.is_instance else {"signal": "SIGINT"}
    timeout = time_ms(app, "kill_timeout", DAY_MS)
    if timeout:
        keys["timeout"] = duration(timeout)
        app.mapped("kill_timeout", f"stop.timeout: {keys['timeout']}")
    elif not app.is_instance:
        app.differs("kill_timeout", "not set: PM2 kills after 1.6 s, fleetd after 10 s")
    if app.take("shutdown_with_message") in (True, "true"):
        _message(app, keys)
    if app.take("treekill") in (False, "false"):
        keys["kill"] = "leader"
        app.mapped("treekill", "stop.kill: leader")
    if keys:
        app.entry["stop"] = keys


def _message(app: Pm2App, keys: dict[str, Any]) -> None:
    """Convert a stop by message: fleetd sends it over the same channel as PM2."""
    if app.is_instance:
        app.refused("shutdown_with_message", "Ollama ends at a signal")
        return
    keys["message"] = "shutdown"
    app.mapped("shutdown_with_message", "stop.message: shutdown; SIGINT where the program has closed the channel")
    if not is_node(app.words):
        program = app.words[0] if app.words else "the program"
        app.warn(
            "shutdown_with_message",
            f"{program} is not Node: it has to read the channel itself, or is killed after the timeout",
        )


def ready(app: Pm2App) -> None:
    """Convert a wait for `process.send('ready')`, where the program has such a line: PM2 goes on without it, fleetd does not."""
    said = app.take("wait_ready")
    timeout = time_ms(app, "listen_timeout", 7 * DAY_MS, 10)
    if said not in (True, "true"):
        if timeout is not None:
            app.refused(
                "listen_timeout", "only a start with wait_ready waits; any other is limited by probes.startup.deadline"
            )
        return
    if app.is_instance or not is_node(app.words) or not says_ready(main_file(app.words, app.folder_of_cwd())):
        app.warn(
            "wait_ready",
            "left out: no process.send('ready') was found in the program, and fleetd would wait for it in vain; if it does say ready, "
            "write probes: {startup: {message: ready}}",
        )
        return
    deadline = duration(timeout or 30_000)
    if timeout:
        app.mapped("listen_timeout", f"probes.startup.deadline: {deadline}")
    app.entry["probes"] = {"startup": {"message": "ready", "deadline": deadline}}
    app.differs(
        "wait_ready",
        f"probes.startup: waits for process.send('ready') for {deadline}; unlike in PM2, silence is a failure",
    )


def schedule(app: Pm2App) -> None:
    cron = app.take("cron_restart")
    if not isinstance(cron, str) or cron in ("0", "false"):
        return
    fields = _NICKNAMES.get(cron.strip().lower(), cron).split()
    if len(fields) == 6 and fields[0].isdigit():
        if int(fields[0]):
            app.differs("cron_restart", f"{cron!r}: at second 0 instead of {fields[0]}")
        fields = fields[1:]
    if len(fields) != 5:
        app.refused("cron_restart", f"{cron!r}: five fields are needed, without seconds")
        return
    times = " ".join(fields)
    try:
        Cron().parse(times)
    except ValueError as error:
        app.refused("cron_restart", str(error))
        return
    # PM2 starts what has ended, and restarts what runs.
    app.entry["schedule"] = {
        **({"start": times} if app.ends else {}), "restart": times, "timezone": app.timezone or "UTC",
    }  # fmt: skip
    if app.timezone:
        app.mapped("cron_restart", f"schedule, in {app.timezone} as this machine")
    else:
        app.warn("cron_restart", "PM2 means this machine's time, whose zone is not known: UTC is written")
