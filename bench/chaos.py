"""Inject random kills, stops, edits and full disks for minutes or hours, then check that nothing was lost.

    python -m bench.chaos [--for 5m] [--seed N]

Invariants:
- One seed, printed first, determines all random choices. It does not determine the timing of the machine.
- Every claim of fleetd is checked from outside: processes in /proc, lines in the log files.
- The first two thirds of a run hit the daemon too. In the last third it runs undisturbed, so that its memory and
  descriptors can be compared.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from bench.chaos_checks import Counters, Gauge, census, leaders, lines, living_with, log_errors
from bench.rig import RunningFleet, scratch
from tests.support.ports import free_port
from tests.support.waiting import until

CHILD = Path(__file__).with_name("chaos_child.py").resolve()
ROOT = Path(__file__).resolve().parents[1]
QUICK = {
    "policy": "always",
    "backoff": {"initial": "20ms", "max": "200ms"},
    "crash_loop": {"count": 100_000, "window": "1m"},
}
SETTLE_S = 60.0


class Chaos:
    """A fleet under attack. `disk` is the folder on a file system of its own that can be filled, None where there is none."""

    def __init__(self, folder: Path, seed: int, disk: Path | None) -> None:
        self.random = random.Random(seed)
        self.folder, self.disk = folder, disk
        self.names = itertools.count(1)
        self.services: dict[str, dict[str, Any]] = {}
        self.stopped: set[str] = set()
        self.done: Counter[str] = Counter()
        self.frozen: list[tuple[float, int]] = []
        for sub in ("progress", "locks"):
            (folder / sub).mkdir()
        for kind, capture in (
            ("writer", "file"),
            ("writer", "file"),
            ("writer", "pipe"),
            ("writer", "pipe"),
            ("tree", "file"),
        ):
            self._add(kind, capture)
        os.environ["CHAOS_FOLDER"] = str(folder)  # identifies every process of this run
        self.fleet = RunningFleet(folder, self._yaml(), free_port())
        self.head = self.fleet.config.read_text().split("services:")[0]
        self.counters = Counters()
        self.gauge = Gauge()

    # -- the configuration ------------------------------------------------------------------------------------------------

    def _add(self, kind: str, capture: str) -> str:
        name = f"{kind}-{next(self.names)}"
        self.services[name] = {
            "command": [sys.executable, "-I", "-S", str(CHILD), str(self.folder), name, kind],
            "restart": QUICK,
            "stop": {"timeout": "2s"},
            "env": {"VERSION": "1"},
            "logs": {"max_size": 256 << 10, "keep": 1000, "compress": self.random.random() < 0.5, "capture": capture},
        }
        return name

    def _yaml(self) -> str:
        return f"services: {json.dumps(self.services)}\n"

    def _write(self, text: str, whole: bool = True) -> None:
        """Write fleet.yaml by rename, or in place and in two pieces, as some editors and most scripts do."""
        config = self.fleet.config
        if whole:
            part = config.with_name(".part")
            part.write_text(text)
            part.replace(config)
            return
        with config.open("w") as file:
            file.write(text[: len(text) // 2])
            file.flush()
            time.sleep(self.random.uniform(0, 0.3))
            file.write(text[len(text) // 2 :])

    def save(self) -> None:
        self._write(self.head + self._yaml(), self.random.random() < 0.7)

    # -- what is done to it -----------------------------------------------------------------------------------------------

    def kill_daemon(self) -> None:
        self.fleet_kill(signal.SIGKILL)
        time.sleep(self.random.choice((0, 0, 0.2, 1.5)))
        self.fleet.__enter__()

    def fleet_kill(self, number: signal.Signals) -> None:
        os.kill(self.fleet.pid, number)
        assert self.fleet.process is not None
        self.fleet.process.wait(timeout=SETTLE_S)

    def end_daemon(self) -> None:
        """SIGTERM: everything has to be gone with it."""
        self._thaw(everything=True)
        self.fleet_kill(signal.SIGTERM)
        left = living_with(self.folder)
        if left:
            raise AssertionError(f"the daemon ended and left {left}")
        self.fleet.__enter__()

    def freeze_daemon(self) -> None:
        os.kill(self.fleet.pid, signal.SIGSTOP)
        time.sleep(self.random.uniform(0.2, 2.5))
        os.kill(self.fleet.pid, signal.SIGCONT)

    def reexecute(self) -> None:
        self.fleet.ctl("daemon-reexec", check=False)

    def hurt_child(self) -> None:
        """A signal to any process of the fleet: leaders and workers alike."""
        living = sorted(living_with(self.folder))
        if not living:
            return
        pid = self.random.choice(living)
        number = self.random.choice(
            [signal.SIGKILL] * 4 + [signal.SIGTERM, signal.SIGINT, signal.SIGSEGV, signal.SIGSTOP]
        )
        with suppress(ProcessLookupError):
            os.kill(pid, number)
            if number is signal.SIGSTOP:
                self.frozen.append((time.monotonic() + self.random.uniform(0.2, 3), pid))

    def _thaw(self, everything: bool = False) -> None:
        now = time.monotonic()
        for at, pid in [entry for entry in self.frozen if everything or entry[0] <= now]:
            self.frozen.remove((at, pid))
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def edit_hot(self) -> None:
        self.services[self.random.choice(list(self.services))]["stop"] = {"timeout": f"{self.random.randint(1, 3)}s"}
        self.save()

    def edit_restart(self) -> None:
        self.services[self.random.choice(list(self.services))]["env"] = {"VERSION": str(self.random.randint(1, 99))}
        self.save()

    def add(self) -> None:
        if len(self.services) < 9:
            self._add(self.random.choice(("writer", "writer", "tree")), self.random.choice(("file", "pipe")))
            self.save()

    def remove(self) -> None:
        if len(self.services) > 3:
            name = self.random.choice(list(self.services))
            del self.services[name]
            self.stopped.discard(name)
            self.counters.forget(name)
            self.save()

    def garbage(self) -> None:
        """Break the file for a while; the fleet must not care."""
        whole = self.head + self._yaml()
        bad = self.random.choice(
            ("", "{", "services: [1, 2]\n", whole[: len(whole) // 2], "\0\xff" * 100, whole + "nonsense: {a: 1}\n")
        )
        self._write(bad, self.random.random() < 0.5)
        time.sleep(self.random.uniform(0, 1.0))
        if self.random.random() < 0.3:
            self.fleet.ctl("reload", check=False)
        self.save()

    def order(self) -> None:
        name = self.random.choice(list(self.services))
        verb = self.random.choice(("restart", "stop", "start"))
        self.fleet.ctl(verb, name, "--timeout", "5s", check=False)
        # what was ordered may have been overtaken by an edit; the next order of the end is what counts
        if verb == "stop":
            self.stopped.add(name)
        elif verb == "start":
            self.stopped.discard(name)

    def fill_disk(self) -> None:
        if self.disk is None:
            return
        filler = self.disk / "filler"
        with suppress(OSError), filler.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(1 << 18))
        time.sleep(self.random.uniform(0.3, 2))
        filler.unlink()

    # -- the run ----------------------------------------------------------------------------------------------------------

    def play(self, seconds: float) -> list[str]:
        """Attack for so long; return what is wrong afterwards."""
        always: list[tuple[int, Callable[[], None]]] = [
            (10, self.hurt_child),
            (3, self.edit_hot),
            (3, self.edit_restart),
            (3, self.add),
            (2, self.remove),
            (3, self.garbage),
            (3, self.order),
            *([(1, self.fill_disk)] if self.disk is not None else []),
        ]
        daemon: list[tuple[int, Callable[[], None]]] = [
            (4, self.kill_daemon),
            (1, self.end_daemon),
            (2, self.freeze_daemon),
            (2, self.reexecute),
        ]
        began = time.monotonic()
        with self.fleet:
            try:
                self._attack([*always, *daemon], began + seconds * 2 / 3)
                self._settle()
                self.gauge.read(self.fleet.pid, len(self.services))
                self._attack(always, began + seconds)
                self._settle()
                self.gauge.read(self.fleet.pid, len(self.services))
                found = self._inspect()
                for name in self.services:
                    self.fleet.ctl("stop", name)
                found += [f"after the stop of everything: {left}" for left in [living_with(self.folder)] if left]
            finally:
                self._thaw(everything=True)
        found += [f"the daemon ended and left {left}" for left in [living_with(self.folder)] if left]
        return [*found, *lines(self.folder, self.folder / "logs"), *log_errors(self.folder / "fleetd.log")]

    def _attack(self, actions: list[tuple[int, Callable[[], None]]], until: float) -> None:
        weights = [weight for weight, _ in actions]
        while time.monotonic() < until:
            (_, action) = self.random.choices(actions, weights)[0]
            action()
            self.done[action.__name__] += 1
            self._thaw()
            self._read_counters()
            time.sleep(self.random.uniform(0.05, 0.8))

    def _read_counters(self) -> None:
        with suppress(OSError, ValueError, KeyError):
            self.counters.read(self.fleet.status(), set(self.services))

    def _settle(self) -> None:
        """Bring everything up, and wait until it is."""
        self._thaw(everything=True)
        self._write(self.head + self._yaml())
        until(self._applied, "the last file is applied", SETTLE_S, period_s=0.1)
        for name in sorted(self.stopped):
            self.fleet.ctl("start", name, check=False)
        self.stopped.clear()
        until(lambda: not self._not_ready(), "everything is ready", SETTLE_S, period_s=0.1)

    def _applied(self) -> bool:
        with suppress(OSError, ValueError, KeyError):
            return {row["name"] for row in self.fleet.status()["processes"]} == set(self.services)
        return False

    def _not_ready(self) -> list[str]:
        """Return what is not up, or not yet one process: a leader that forks is two for a moment."""
        with suppress(OSError, ValueError, KeyError):
            rows = {row["name"]: row for row in self.fleet.status()["processes"]}
            now = census(self.folder)
            return [name for name in self.services if rows[name]["state"] != "READY" or len(leaders(now, name)) != 1]
        return ["the daemon does not answer"]

    def _inspect(self) -> list[str]:
        self._read_counters()
        found = self.counters.wrong + self.gauge.wrong()
        rows = {row["name"]: row for row in self.fleet.status()["processes"]}
        now = census(self.folder)
        for name in set(now) - set(self.services):
            found.append(f"{name} is not in the file, and {now[name]} live")
        for name in self.services:
            kind = name.split("-")[0]
            if leaders(now, name) != [rows[name]["pid"]]:
                found.append(f"{name}: pid {rows[name]['pid']} is reported as running, but {leaders(now, name)} are")
            elif kind == "tree" and len(now[name]) > 4:
                found.append(f"{name}: {len(now[name])} processes where a run has four: {now[name]}")
        overlaps = self.folder / "overlaps"
        return found + (overlaps.read_text().splitlines() if overlaps.exists() else [])


def duration(text: str) -> float:
    from fleetd.units import parse_duration

    return parse_duration(text)


@contextmanager
def small_disk(folder: Path, seconds: float) -> Iterator[Path | None]:
    """Give the logs a small disk of their own, so that it can be filled; None where that is not allowed."""
    disk = folder / "logs"
    disk.mkdir()
    size = f"size={max(64, int(seconds * 0.3))}m"
    command = ["mount", "-t", "tmpfs", "-o", size, "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(command, capture_output=True, check=False).returncode == 0
    try:
        yield disk if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(disk)], check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--for", dest="seconds", type=duration, default=300.0, metavar="DURATION")
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    asked = parser.parse_args()
    print(f"chaos: seed {asked.seed}, {asked.seconds:g} s")
    sys.stdout.flush()
    with scratch("chaos") as folder, small_disk(folder, asked.seconds) as disk:
        if disk is None:
            print("  no disk of its own to fill: that needs the right to mount")
        chaos = Chaos(folder, asked.seed, disk)
        found: list[str] = []
        try:
            found = chaos.play(asked.seconds)
        except (AssertionError, RuntimeError) as error:
            found = [f"{type(error).__name__}: {error}", (folder / "fleetd.log").read_text()[-3000:]]
        finally:
            for pid in living_with(folder):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            if found:
                keep = Path(f"/tmp/fleetd-chaos-{asked.seed}")
                shutil.rmtree(keep, ignore_errors=True)
                subprocess.run(["cp", "-a", str(folder), str(keep)], check=False)
                print(f"kept: {keep}")
        print("  " + ", ".join(f"{name.replace('_', ' ')} {count}" for name, count in sorted(chaos.done.items())))
        print(f"  restarts counted: {chaos.counters.total()}; {chaos.gauge.text()}")
        for sentence in found:
            print(f"WRONG: {sentence}")
        print(
            f"chaos: seed {asked.seed}: {f'{len(found)} things are wrong' if found else 'nothing lost, nothing left, nothing twice'}"
        )
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
