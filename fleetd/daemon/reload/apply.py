"""What changes the daemon as a whole: plan, apply, reload, re-execution, shutdown.

The rules of this file
- A bad file changes nothing; its first problem stays in the status until a good one comes.
- Apply tells the fleet everything in one event; the fleet restarts only what a restart alone can change.
- Re-execution replaces the program in the same PID; children, their pipes and the locks go on, both listeners are opened anew.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from fleetd.control.event_codes import EventCode
from fleetd.control.port import ActOptions, ApplyOptions
from fleetd.control.wire import ActionResult, Applied, Plan
from fleetd.core.data.events import SpecChanged
from fleetd.daemon.own_memory import give_back
from fleetd.daemon.reload.messages import Reading
from fleetd.daemon.wiring import Daemon
from fleetd.errors import ApiError, ConfigError, HostError
from fleetd.resolver.change_plan import affected, plan_of
from fleetd.resolver.resolved import Assembly

TURN_S = 20.0  # shorter than the patience of `fleetctl reload`


class Operations:
    """Implements control_port.Operations. `applied(assembly)` is called after each change, and each refusal; `leave(how)` ends the run."""

    def __init__(
        self,
        daemon: Daemon,
        applied: Callable[[Assembly], None],
        leave: Callable[[bool, str], None],
        reexecute: Callable[[], None],
    ) -> None:
        self._daemon = daemon
        self._applied = applied
        self._leave = leave
        self._reexecute = reexecute
        self._saving = self._saved_again = False

    async def plan(self, path: str | None, text: str | None) -> Plan:
        configuration = self._daemon.configuration
        reading = await configuration.read(Path(path) if path else None, text)
        return plan_of(configuration.assembly, reading.assembly, reading.edits, path or str(configuration.path))

    async def apply(self, path: str | None, options: ApplyOptions) -> Applied:
        async with self._turn():
            plan, wait_for, generations = await self._apply_now(path, options)
            await asyncio.to_thread(give_back)
        results = await self._outcomes(wait_for, generations, options) if wait_for else []
        return {"plan": plan, "results": results}

    @asynccontextmanager
    async def _turn(self) -> AsyncIterator[None]:
        """One change at a time. A file that was just saved is being applied by itself: a reload then waits its turn."""
        applying = self._daemon.configuration.applying
        try:
            async with asyncio.timeout(TURN_S):
                await applying.acquire()
        except TimeoutError:
            raise ApiError(409, "locked", "Another change is being applied.", hint="Try again in a moment.") from None
        try:
            yield
        finally:
            applying.release()

    async def _apply_now(self, path: str | None, options: ApplyOptions) -> tuple[Plan, list[str], dict[str, int]]:
        """Change the fleet; return the plan, the processes whose state follows from it, and their generations before."""
        configuration = self._daemon.configuration
        while True:
            old = configuration.assembly
            reading = await configuration.read(Path(path) if path else None)
            if configuration.assembly is old:  # a look takes no turn: another change may have been applied beside it
                break
        new = reading.assembly
        plan = plan_of(old, new, reading.edits, path or str(configuration.path))
        if options.expect_hash is not None and options.expect_hash != new.config_hash:
            raise ApiError(
                409,
                "plan_changed",
                "The file was changed after the plan was shown.",
                hint="Look at the plan again.",
            )
        if options.dry_run:
            return plan, [], {}
        self._tell_what_waits(reading)
        wait_for = affected(old, new)
        generations = {name: self._daemon.fleet.queries.generation(name) for name in wait_for}
        await self._change(reading, Path(path) if path else None)
        return plan, wait_for, generations

    def _tell_what_waits(self, reading: Reading) -> None:
        """Say which keys take effect with the next start of the daemon only; until then they are in every plan."""
        daemon = self._daemon
        waiting = tuple(key["path"] for edit in reading.edits for key in edit.keys if key["effect"] == "daemon")
        if waiting and waiting != daemon.facts.restart_needed:
            said = f"{' and '.join(waiting)} can only change when fleetd starts anew"
            daemon.event_log.report("config", None, EventCode.RESTART_NEEDED, said)
            daemon.log.warning("restart needed", reason=said)
        daemon.facts.restart_needed = waiting

    async def _change(self, reading: Reading, path: Path | None) -> None:
        daemon, new = self._daemon, reading.assembly
        before = set(daemon.configuration.assembly.spec.processes) | set(daemon.configuration.assembly.spec.models)
        absent = await daemon.requirements.look(new.plans)
        await daemon.configuration.accept(reading, path)
        daemon.requirements.accept(absent)
        daemon.facts.config_error = None
        daemon.facts.config_path = str(daemon.configuration.path)
        for name, plan in new.plans.items():
            daemon.host.logs.set_policy(name, plan.execution.logs)
        daemon.dispatch(SpecChanged(new.spec, missing=absent.processes, missing_models=absent.models))
        daemon.port.spec_changed()
        after = set(new.spec.processes) | set(new.spec.models)
        path = daemon.configuration.path
        daemon.event_log.report(
            "config", None, EventCode.CONFIG_APPLIED, f"{path} applied", config_hash=new.config_hash
        )
        daemon.event_log.forget(sorted(before - after))
        for name in set(daemon.store.remembered) - set(new.spec.processes):
            daemon.store.forget(name)
        daemon.log.info("applied", config=str(daemon.configuration.path), config_hash=new.config_hash)
        self._applied(new)

    async def _outcomes(
        self, names: list[str], generations: dict[str, int], options: ApplyOptions
    ) -> list[ActionResult]:
        if not options.wait:
            return [{"name": name, "result": "accepted", "state": None, "reason": None} for name in names]
        return await self._daemon.actions.settled(names, generations, ActOptions(timeout_s=options.timeout_s))

    async def file_saved(self) -> None:
        """The configuration's files differ from what was read: apply them, or show what is wrong.

        However often it is called meanwhile, the file is read once more after the last call, and no apply runs beside another.
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
        applying = self._daemon.configuration.applying
        while applying.locked():  # it may have read the file before it was saved
            async with applying:
                pass
        try:
            applied = await self.apply(None, ApplyOptions(wait=False))
        except (ConfigError, HostError) as error:
            self.refuse(error)
            return
        except ApiError:
            self._saved_again = True
            return
        if not applied["plan"]["changes"]:
            self._daemon.log.info("unchanged", config=str(self._daemon.configuration.path))

    def refuse(self, error: ConfigError | HostError) -> None:
        """Keep the old fleet, and show why."""
        first = self._daemon.configuration.refused(error)
        self._daemon.facts.config_error = first
        self._daemon.log.error("the configuration cannot be used; the fleet goes on as it is", problems=str(error))
        self._daemon.event_log.report("config", None, EventCode.CONFIG_REJECTED, first)
        self._applied(self._daemon.configuration.assembly)

    async def reexec(self) -> None:
        """Begin a new program in this PID. Raises ConfigError when it could not start on the file as it is now."""
        if self._daemon.facts.stopping:
            raise ApiError(409, "locked", "The daemon is shutting down.")
        configuration = self._daemon.configuration
        reading = await configuration.read(None)
        if reading.assembly.paths != configuration.assembly.paths:
            said = "paths can only change when fleetd is stopped and started: processes and locks are in the old ones."
            raise ApiError(409, "restart_needed", said, hint="`fleetctl shutdown`, then start fleetd.")
        asyncio.get_running_loop().call_later(0.05, self._reexecute)

    def stop(self, force: bool, why: str) -> None:
        self._leave(force, why)
