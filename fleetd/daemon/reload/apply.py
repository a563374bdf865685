"""Plan and apply configuration changes, on request and after a file was saved.

Invariants:
- One change at a time; a rejected file changes nothing.
- The fleet receives a change as one event; it restarts only processes whose change requires a restart.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from fleetd.control.event_codes import EventCode
from fleetd.control.port import ActOptions, ApplyOptions
from fleetd.control.wire import ActionResult, Applied, Plan
from fleetd.core.data.events import SpecChanged
from fleetd.daemon.api.actions import Actions
from fleetd.daemon.context import DaemonContext
from fleetd.daemon.own_memory import trim
from fleetd.daemon.reload.messages import Reading
from fleetd.daemon.reload.read import ConfigReader
from fleetd.daemon.sources.prerequisites import Prerequisites
from fleetd.errors import ApiError, ConfigError, HostError
from fleetd.host.logs.registry import LogRegistry
from fleetd.host.state_store import StateStore
from fleetd.resolver.change_plan import affected, plan_of
from fleetd.units import counted

LOCK_WAIT_S = 20.0  # shorter than the timeout of `fleetctl reload`


class ConfigApplier:
    """Plan, apply and reload; also checks the file before a re-execution."""

    def __init__(
        self,
        context: DaemonContext,
        reader: ConfigReader,
        prerequisites: Prerequisites,
        actions: Actions,
        logs: LogRegistry,
        store: StateStore,
    ) -> None:
        self._context = context
        self._config = context.config
        self._reader = reader
        self._prerequisites = prerequisites
        self._actions = actions
        self._logs = logs
        self._store = store
        self._saving = self._saved_again = False

    async def plan(self, path: str | None, text: str | None) -> Plan:
        reading = await self._reader.read(Path(path) if path else None, text)
        return plan_of(self._config.resolved, reading.resolved, reading.edits, path or str(self._config.path))

    async def apply(self, path: str | None, options: ApplyOptions) -> Applied:
        async with self._locked():
            plan, wait_for, generations = await self._apply_now(path, options)
            await asyncio.to_thread(trim)
        results = await self._outcomes(wait_for, generations, options) if wait_for else []
        return {"plan": plan, "results": results}

    @asynccontextmanager
    async def _locked(self) -> AsyncIterator[None]:
        """Hold the configuration's lock. Raises ApiError if another change is slow.

        A saved file is applied without a request: a reload that follows it waits here.
        """
        applying = self._config.applying
        try:
            async with asyncio.timeout(LOCK_WAIT_S):
                await applying.acquire()
        except TimeoutError:
            raise ApiError(409, "locked", "Another change is being applied.", hint="Try again in a moment.") from None
        try:
            yield
        finally:
            applying.release()

    async def _apply_now(self, path: str | None, options: ApplyOptions) -> tuple[Plan, list[str], dict[str, int]]:
        """Change the fleet; return plan, affected processes, and old generations."""
        config = self._config
        while True:
            old = config.resolved
            reading = await self._reader.read(Path(path) if path else None)
            if config.resolved is old:  # deferred env files may have amended it meanwhile
                break
        new = reading.resolved
        plan = plan_of(old, new, reading.edits, path or str(config.path))
        if new.warnings:
            plan["warnings"] = [warning.headline for warning in new.warnings]
        if options.expect_hash is not None and options.expect_hash != new.config_hash:
            raise ApiError(
                409,
                "plan_changed",
                "The file was changed after the plan was shown.",
                hint="Look at the plan again.",
            )
        if options.dry_run:
            return plan, [], {}
        self._report_deferred_keys(reading)
        wait_for = affected(old, new)
        generations = {name: self._context.queries.generation(name) for name in wait_for}
        await self._change(reading, Path(path) if path else None)
        return plan, wait_for, generations

    def _report_deferred_keys(self, reading: Reading) -> None:
        """Report keys that change at the next start; until then plans show them."""
        keys = tuple(key["path"] for edit in reading.edits for key in edit.keys if key["effect"] == "daemon")
        if keys and keys != self._config.restart_needed:
            reason = f"{' and '.join(keys)} can only change when fleetd restarts"
            self._context.reporter.events.report("config", None, EventCode.RESTART_NEEDED, reason)
            self._context.reporter.log.warning("restart needed", reason=reason)
        self._config.restart_needed = keys

    async def _change(self, reading: Reading, path: Path | None) -> None:
        config, new, reporter = self._config, reading.resolved, self._context.reporter
        before = set(config.resolved.spec.processes) | set(config.resolved.spec.models)
        missing = await self._prerequisites.check(new.plans)
        await config.accept(reading, path)
        self._prerequisites.accept(missing)
        for name, plan in new.plans.items():
            self._logs.set_policy(name, plan.execution.logs)
        self._context.dispatch(SpecChanged(new.spec, missing=missing.processes, missing_models=missing.models))
        after = set(new.spec.processes) | set(new.spec.models)
        count = len(new.warnings)
        noted = f", with {counted(count, 'warning')} (fleetd check {config.path})" if count else ""
        reporter.events.report(
            "config", None, EventCode.CONFIG_APPLIED, f"{config.path} applied{noted}", config_hash=new.config_hash
        )
        reporter.events.forget(sorted(before - after))
        for name in set(self._store.remembered) - set(new.spec.processes):
            self._store.forget(name)
        reporter.log.info("applied", config=str(config.path), config_hash=new.config_hash)
        for warning in new.warnings:
            reporter.log.warning("configuration", problem=warning.headline)
        config.publish()

    async def _outcomes(
        self, names: list[str], generations: dict[str, int], options: ApplyOptions
    ) -> list[ActionResult]:
        if not options.wait:
            return [{"name": name, "result": "accepted", "state": None, "reason": None} for name in names]
        return await self._actions.settled(names, generations, ActOptions(timeout_s=options.timeout_s))

    async def file_saved(self) -> None:
        """Apply the saved files of the configuration, or show what is wrong with them.

        Calls during an apply are merged: the file is read once more after the last of them.
        """
        self._saved_again = True
        if self._saving:
            return
        self._saving = True
        try:
            while self._saved_again:
                self._saved_again = False
                await self._apply_saved()
        finally:
            self._saving = False

    async def _apply_saved(self) -> None:
        config, log = self._config, self._context.reporter.log
        while config.applying.locked():  # that apply may have read the file before it was saved
            async with config.applying:
                pass
        try:
            applied = await self.apply(None, ApplyOptions(wait=False))
        except (ConfigError, HostError) as error:
            first = config.reject(error)
            text = "fleet.yaml has errors and was not applied; the previous configuration stays in force"
            problems = error.problems if isinstance(error, ConfigError) else ()
            for problem in [one.headline for one in problems] or [first]:
                log.error(text, problem=problem)
            self._context.reporter.events.report("config", None, EventCode.CONFIG_REJECTED, first)
            config.publish()
            return
        except ApiError:
            self._saved_again = True
            return
        if not applied["plan"]["changes"]:
            log.info("unchanged", config=str(config.path))

    async def check_restart(self) -> None:
        """Raise ConfigError or ApiError if a new daemon could not use the file."""
        reading = await self._reader.read()
        if reading.resolved.paths != self._config.resolved.paths:
            message = "paths can only change when fleetd is stopped and started: processes and locks use the old ones."
            raise ApiError(409, "restart_needed", message, hint="`fleetctl shutdown`, then start fleetd.")
