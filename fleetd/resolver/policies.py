"""Translate keys of fleet.yaml to policies of the core and the host.

Invariants:
- Pure. A missing key takes the documented default; a probe takes it from its engine, then from its kind.
"""

from __future__ import annotations

from dataclasses import replace

from fleetd.config.schema.model import EngineModel
from fleetd.config.schema.process import LogsKeys, ProbeKeys, ProcessKeys, RestartKeys, StopKeys
from fleetd.core.data.specs import Backoff, CrashLoop, Probes, ProbeSpec, RestartMode, RestartPolicy
from fleetd.host.types import LogPolicy, StopPolicy

STARTUP = ProbeSpec(period_s=0.1, timeout_s=2.0, failures=1, deadline_s=300.0)
READINESS = ProbeSpec(period_s=2.0, timeout_s=2.0, failures=3)
LIVENESS = ProbeSpec(period_s=30.0, timeout_s=20.0, failures=3)


def restart_policy(keys: RestartKeys) -> RestartPolicy:
    backoff, loop = keys.backoff, keys.crash_loop
    return RestartPolicy(
        mode=RestartMode(keys.policy),
        success_codes=keys.success_codes,
        backoff=Backoff(backoff.initial, backoff.factor, backoff.max, backoff.jitter),
        stable_after_s=keys.stable_after,
        crash_loop=CrashLoop(loop.count, loop.window, loop.then, loop.every),
    )


def stop_policy(keys: StopKeys) -> StopPolicy:
    return StopPolicy(keys.signal, keys.timeout, keys.kill, keys.command or (), keys.message)


def log_policy(keys: LogsKeys) -> LogPolicy:
    return LogPolicy(max_size_bytes=keys.max_size, keep=keys.keep, compress=keys.compress, capture=keys.capture)


def probe(keys: ProbeKeys | None, default: ProbeSpec | None, kind: ProbeSpec) -> ProbeSpec | None:
    """Return the probe of fleet.yaml, completed by the engine's and the default one."""
    if keys is None:
        return default
    base = default or kind
    return replace(
        kind,
        http=keys.http,
        tcp=keys.tcp,
        exec=keys.exec or (),
        log_line=keys.log_line,
        completion=keys.completion,
        message=keys.message,
        period_s=keys.period if keys.period is not None else base.period_s,
        timeout_s=keys.timeout if keys.timeout is not None else base.timeout_s,
        failures=keys.failures if keys.failures is not None else base.failures,
        successes=keys.successes if keys.successes is not None else base.successes,
        deadline_s=keys.deadline if keys.deadline is not None else base.deadline_s,
    )


def probes(keys: ProcessKeys, engine: Probes) -> Probes:
    return Probes(
        startup=_startup(keys, engine),
        readiness=probe(keys.probes.readiness, engine.readiness, READINESS),
        liveness=probe(keys.probes.liveness, engine.liveness, LIVENESS),
    )


def _startup(keys: ProcessKeys, engine: Probes) -> ProbeSpec | None:
    """Return the startup probe; a set `load_timeout` of its model is its deadline."""
    spec = probe(keys.probes.startup, engine.startup, STARTUP)
    if spec is None or not isinstance(keys, EngineModel) or "load_timeout" not in keys.model_fields_set:
        return spec
    stated = keys.probes.startup.deadline if keys.probes.startup is not None else None
    return replace(spec, deadline_s=min(keys.load_timeout, stated if stated is not None else keys.load_timeout))


def needs_port(wanted: Probes) -> str | None:
    """Return the kind of a probe that cannot work without a port; None: none does."""
    for name in ("startup", "readiness", "liveness"):
        spec: ProbeSpec | None = getattr(wanted, name)
        if spec is not None and (spec.http or spec.tcp or spec.completion):
            return name
    return None
