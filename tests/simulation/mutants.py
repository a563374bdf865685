"""`python -m tests.simulation.mutants [NAME ...]`: check that the simulation finds planted bugs, each in bounded time.

Every mutant is one edit of the source text of a temporary copy of fleetd/core; the simulation runs there as it runs here. Prints a
table; exits 1 when one survives, 2 when an edit no longer fits the source.
"""

# ruff: noqa: E501 (a planted text is on one line, as in the source)

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
SEED, STEPS, RUNS, LIMIT_S = 1, 80, 40, 180.0
WORKERS = 2


@dataclass(frozen=True)
class Mutant:
    name: str
    module: str
    old: str
    new: str


MUTANTS = (
    Mutant("evicts what is starting", "models/eviction", "p.state in (Residency.LOADED, Residency.ASLEEP) and p.key", "p.key"),
    Mutant("evicts what is busy", "models/eviction", "if not p.in_flight]", "]"),
    Mutant("ignores pins", "models/eviction", "if not models[p.model].pinned]", "]"),
    Mutant("no generation check", "handlers", "process is None or process.generation != generation", "process is None"),
    Mutant("no fairness bound", "requests/admission", "waiting.overdue = now >= waiting.arrived_s + bound", "waiting.overdue = False"),
    Mutant("later requests pass the head", "requests/admission", "if claimed & set(need):", "if False:"),
    Mutant("preloads pass the line", "models/preload", " or state.claimed & set(need)", ""),
    Mutant(
        "frees the reservation with the order", "models/reconcile", "placement.ordered, placement.ordered_s = True, now\n            self.state.emit(Unload(",
        "placement.ordered = True\n            self.state.ledger.release(placement.key)\n            self.state.emit(Unload(",
    ),
    Mutant("unloads while the load is not answered", "models/reconcile", "placement.state is Residency.LOADING and not placement.ordered", "placement.state is Residency.LOADING"),
    Mutant("frees a failed load at once", "models/reconcile", "LINGER_S = 0.2", "LINGER_S = 0.0"),
    Mutant("orders a load again and again", "models/reconcile", "placement.ordered, placement.ordered_s = process.generation, True, now", "placement.ordered, placement.ordered_s = process.generation, False, now"),
    Mutant("forgets a load that a restart cut off", "models/reconcile", "        elif ended:  #", "        elif False:  #"),
    Mutant("counts an ordered stop as a death", "processes/termination", "outcome, process.outcome = process.outcome, None", "outcome, process.outcome = process.outcome or ExitReport(1), None"),
    Mutant("starts before the set is empty", "processes/termination", "        self.state.emit(Sweep(process.name, process.generation, describe_exit(report)))", "        self.state.emit(Sweep(process.name, process.generation, describe_exit(report)))\n        self.set_empty(process, (), now)"),
    Mutant("starts next to survivors", "processes/termination", "        process.survivors = survivors\n", "        survivors = ()\n"),
    Mutant("forgets to reset the backoff", "processes/reconcile", "process.record.stable()", "pass"),
    Mutant("never gives up", "processes/restart_policy", "recent >= loop.count or", ""),
    Mutant("no start deadline", "processes/reconcile", "return process.progress_s + startup.deadline_s", "return None"),
    Mutant("no end of BACKOFF", "processes/reconcile", "            yield process.next_start_s", "            yield from ()"),
    Mutant("no end of a drain", "processes/reconcile", "yield process.leave_s + spec.drain_timeout_s", "yield from ()"),
    Mutant("ignores lanes", "processes/start_gate", "return Gate(False, busy) if busy else _OPEN", "return _OPEN"),
    Mutant("grants while draining", "requests/routing", "state is not ProcessState.READY", "state is ProcessState.STARTING"),
    Mutant("grants beyond the slots", "requests/routing", "or placement.in_flight >= model.spec.concurrency", ""),
    Mutant("grants twice", "requests/admission", "        self.queue.leave(waiting.request_id)\n        self._grant", "        self._grant"),
    Mutant("loses count on cancel", "requests/queue", "model.waiting -= 1", "pass"),
    Mutant("never rejects at the timeout", "requests/queue", "elif now >= waiting.deadline_s:", "elif False:"),
    Mutant("idle time from the start of a request", "requests/admission", "        placement.in_flight -= 1\n        placement.last_used_s = now", "        placement.in_flight -= 1"),
    Mutant("generation begins again", "spec_update", "self.state.retired.pop(spec.name, 0)", "0"),
    Mutant("routes to a sleeper", "requests/routing", "placement.state is not Residency.LOADED\n", "placement.state not in (Residency.LOADED, Residency.ASLEEP)\n"),
    Mutant("forgets what a sleeper holds", "models/sleep", "self.state.ledger.correct(placement.key, reservation_of(model, placement))", "self.state.ledger.correct(placement.key, {})"),
    Mutant("sleeps and wakes during a start", "models/sleep", "return self.state.waits_for_lane(placement, waits)", "return False"),
    Mutant("believes in a wake that failed", "models/sleep", "elif state is SleepState.AWAKE and step is SleepStep.WAKE:", "elif step is SleepStep.WAKE:"),
    Mutant("no end of a wake without an answer", "models/sleep", "if now >= self._deadline(placement):", "if False:"),
    Mutant("takes an adopted sleeper for awake", "spec_update", "placement.step, placement.slept = SleepStep.CHECK, True", "pass"),
    Mutant("wakes without the room", "models/candidates", "max(0, size - held.get(device, 0)) for", "0 for"),
    Mutant("waits for a down model though a fallback serves", "requests/queue", "relieved(state, model, waiting.fallback, now) or self._foreign", "self._foreign"),
    Mutant("a stop by an operator does not last", "processes/reconcile", "if self.state.shutting_down or process.stopped or", "if self.state.shutting_down or"),
)  # fmt: skip


def try_out(mutant: Mutant) -> tuple[Mutant, str, float, str]:
    """Return the mutant with killed, survived or stale, the seconds it took, and what found it."""
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="mutant-") as folder:
        root = Path(folder)
        shutil.copytree(
            ROOT / "fleetd" / "core", root / "fleetd" / "core", ignore=shutil.ignore_patterns("__pycache__")
        )
        for name in ("__init__.py", "errors.py", "units.py"):
            shutil.copy(ROOT / "fleetd" / name, root / "fleetd" / name)
        shutil.copytree(
            ROOT / "tests" / "simulation", root / "tests" / "simulation", ignore=shutil.ignore_patterns("__pycache__")
        )
        (root / "tests" / "__init__.py").touch()  # or an installed package wins
        target = root / "fleetd" / "core" / f"{mutant.module}.py"
        source = target.read_text("utf-8")
        if source.count(mutant.old) != 1:
            return mutant, "stale", 0.0, f"its text occurs {source.count(mutant.old)} times in {mutant.module}.py"
        target.write_text(source.replace(mutant.old, mutant.new), "utf-8")
        command = [sys.executable, "-m", "tests.simulation", str(SEED), str(STEPS), str(RUNS)]
        try:
            done = subprocess.run(
                command,
                cwd=root,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
                env={"PYTHONPATH": folder},
            )
        except subprocess.TimeoutExpired:
            return mutant, "survived", time.perf_counter() - began, f"nothing found in {LIMIT_S:g} s"
        took_s = time.perf_counter() - began
        said = (done.stdout or done.stderr).strip().splitlines()
        if done.returncode == 0:
            return mutant, "survived", took_s, said[-1] if said else ""
        first = said[0] if done.stdout else said[-1]
        return mutant, "killed", took_s, first.split(": ", 2)[-1][:110]


def main(names: list[str]) -> int:
    chosen = [mutant for mutant in MUTANTS if not names or any(name in mutant.name for name in names)]
    began = time.perf_counter()
    results = []
    with ThreadPoolExecutor(WORKERS) as pool:
        for mutant, verdict, took_s, said in pool.map(try_out, chosen):
            print(f"{verdict:9} {took_s:6.1f} s  {mutant.name:42} {said}", flush=True)
            results.append(verdict)
    killed = results.count("killed")
    print(f"{killed} of {len(results)} planted bugs were found, in {time.perf_counter() - began:.0f} s")
    if "stale" in results:
        return 2
    return 0 if killed == len(results) else 1


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
