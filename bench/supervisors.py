"""Run the same seven scenarios on fleetd, supervisord and PM2 and print one table of losses.

    python -m bench.supervisors [--only SCENARIO ...] [--markdown FILE]

supervisord and pm2 are taken from PATH and skipped with a message if missing. Every number is counted from outside: runs by
the programs themselves, processes in /proc, lines in the files.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench import supervised_programs as programs
from bench.rig import scratch
from bench.supervised import Fleetd, FleetdPipe, Job, Pm2, Supervisor, Supervisord, end, marked, python
from tests.support.waiting import until

PROGRAMS = Path(programs.__file__).resolve()
AFTER_S = 20.0  # how long a crasher is watched
SETTLE_S = 8.0  # longer than every supervisor's own patience at a stop
LINES = re.compile(rb"(\d{4}) (\d{5}) x{48}")
FLOOD = re.compile(rb"(\d{8}) y{50}")


class Scene:
    """One supervisor with one program, in a folder of its own."""

    def __init__(self, kind: type[Supervisor], folder: Path, what: str, **more: object) -> None:
        self.folder = folder
        self.marker = f"marker-{os.getpid()}-{folder.name}"
        command = python(str(PROGRAMS), what, str(folder), self.marker)
        self.supervisor = kind(folder, Job(command, **more))  # type: ignore[arg-type]

    def runs(self) -> list[float]:
        """Return when each run of the program began."""
        try:
            return [float(line) for line in (self.folder / "runs").read_text().split()]
        except OSError:
            return []

    def living(self) -> set[int]:
        """Return the program's processes, without the supervisor that has the same words in its own command line."""
        return {pid for pid in marked(self.marker) if pid != self.supervisor.pid()}


@contextmanager
def scene(kind: type[Supervisor], what: str, **more: object) -> Iterator[Scene]:
    with scratch("supervisors") as folder:
        made = Scene(kind, folder, what, **more)
        made.supervisor.start()
        try:
            until(lambda: bool(made.runs()), "the first run")
            yield made
        finally:
            with suppress(Exception):
                made.supervisor.close()
            end(marked(made.marker))


def watch(seconds: float) -> None:
    end = time.monotonic() + seconds
    until(lambda: time.monotonic() >= end, "the time to watch", seconds + 60, period_s=0.05)


def late_crasher(kind: type[Supervisor]) -> str:
    with scene(kind, "late") as made:
        until(lambda: len(made.runs()) > 1, "the second run", programs.LATE_S + 30)
        watch(AFTER_S)
        count, state = len(made.runs()) - 1, made.supervisor.state()
        watch(3.0)
        more = len(made.runs()) - 1 - count
        return f"{'gave up after' if not more else 'still going,'} {count} restarts, says {state}"


def short_crasher(kind: type[Supervisor]) -> str:
    with scene(kind, "short") as made:
        watch(AFTER_S)
        count = len(made.runs())
        watch(5.0)
        runs = made.runs()
        given_up = len(runs) == count
        took = f" in {runs[-1] - runs[0]:.0f} s" if given_up else f" in {AFTER_S:.0f} s"
        return f"{'gave up after' if given_up else 'still going,'} {count} starts{took}, says {made.supervisor.state()}"


def dead_leader(kind: type[Supervisor]) -> str:
    with scene(kind, "tree") as made:
        until(lambda: len(made.living()) == 4, "the leader and its workers")
        before = made.living()
        leader = min(before)
        end({leader})
        until(lambda: len(made.runs()) > 1, "the next run")
        watch(SETTLE_S)
        left = made.living() & before
        return f"{len(left)} of 3 workers still running next to the new ones" if left else "none left"


def stopped_tree(kind: type[Supervisor]) -> str:
    with scene(kind, "tree") as made:
        until(lambda: len(made.living()) == 4, "the leader and its workers")
        made.supervisor.stop_job()
        watch(SETTLE_S)
        left = len(made.living())
        return f"{left} of 4 processes left, says {made.supervisor.state()}" if left else "none left"


def tail_at_exit(kind: type[Supervisor]) -> str:
    with scene(kind, "tail", restart_at_once=True) as made:
        until(lambda: len(made.runs()) > programs.RUNS_AT_EXIT, "a hundred runs", 600)
        watch(3.0)
        seen: dict[bytes, int] = {}
        cut = 0
        for path in made.supervisor.logs():
            for line in path.read_bytes().split(b"\n"):
                match = LINES.search(line)
                if match:
                    seen[match[1]] = seen.get(match[1], 0) + 1
                elif b"xx" in line:
                    cut += 1
        expected = programs.RUNS_AT_EXIT * programs.LINES_AT_EXIT
        short = sum(
            1 for run in range(1, programs.RUNS_AT_EXIT + 1) if seen.get(b"%04d" % run, 0) < programs.LINES_AT_EXIT
        )
        lost = expected - sum(seen.values())
        return (
            f"{lost} of {expected} lines lost, {short} of {programs.RUNS_AT_EXIT} runs cut"
            if lost or cut
            else "none lost"
        )


def rotation(kind: type[Supervisor]) -> str:
    with scene(kind, "flood", rotate_bytes=1 << 20) as made:
        until((made.folder / "written").exists, "all lines are written", 600)
        watch(5.0)
        files = made.supervisor.logs()
        found: set[int] = set()
        cut = 0
        for path in files:
            content = path.read_bytes().replace(b"\0", b"")
            for line in content.split(b"\n"):
                match = FLOOD.search(line)
                if match:
                    found.add(int(match[1]))
                elif line and (b"yy" in line or line[:8].isdigit()):
                    cut += 1
        lost = programs.LINES_UNDER_ROTATION - len(found)
        if len(files) == 1:
            return f"no rotation of its own (a module); {lost} lines lost"
        return (
            f"{lost} of {programs.LINES_UNDER_ROTATION} lines lost, {cut} pieces, {len(files) - 1} rotations"
            if lost or cut
            else (f"none lost, {len(files) - 1} rotations")
        )


def killed_supervisor(kind: type[Supervisor]) -> str:
    with scene(kind, "still") as made:
        before = made.living()
        made.supervisor.crash()
        watch(SETTLE_S)
        after = made.living()
        if after == before:
            return "same process, adopted"
        kept = len(after & before)
        return f"{len(after)} processes of one app ({kept} unwatched)" if len(after) > 1 else "the app was restarted"


SCENARIOS: dict[str, tuple[str, Callable[[type[Supervisor]], str]]] = {
    "late": ("an app that lived 20 s, then dies at every start (20 s watched)", late_crasher),
    "short": ("an app that dies 0.3 s after every start (20 s watched)", short_crasher),
    "leader": ("kill -9 of a leader with three workers: the old workers", dead_leader),
    "stop": ("stop of a leader with three workers that ignore signals", stopped_tree),
    "tail": (f"{programs.RUNS_AT_EXIT} runs that write {programs.LINES_AT_EXIT} lines and exit at once", tail_at_exit),
    "rotation": (f"{programs.LINES_UNDER_ROTATION} lines at full speed, files of 1 MiB", rotation),
    "crash": ("kill -9 of the supervisor, then its start", killed_supervisor),
}


def show(rows: list[tuple[str, dict[str, str]]], titles: list[str]) -> str:
    lines = ["| scenario | " + " | ".join(titles) + " |", "|---" * (len(titles) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(cells.get(name, "–") for name in titles) + " |" for title, cells in rows]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=list(SCENARIOS), default=list(SCENARIOS))
    parser.add_argument("--markdown", type=Path, help="also write the table into this file, between its markers")
    asked = parser.parse_args()
    kinds: list[type[Supervisor]] = [Fleetd]
    for kind in (Supervisord, Pm2):
        reason = kind.why_not()
        print(f"{kind.title}: left out, {reason}") if reason else kinds.append(kind)
    rows: list[tuple[str, dict[str, str]]] = []
    for name in asked.only:
        title, play = SCENARIOS[name]
        cells: dict[str, str] = {}
        for kind in [*kinds, *([FleetdPipe] if name in ("tail", "rotation") else [])]:
            cells[kind.title] = play(kind)
            print(f"{name:9} {kind.title:22} {cells[kind.title]}")
            sys.stdout.flush()
        rows.append((title, cells))
    table = show(rows, [kind.title for kind in kinds])
    print(f"\n{table}")
    if asked.markdown is not None:
        write(asked.markdown, table)


def write(path: Path, table: str) -> None:
    """Put the table between the markers of a page."""
    text = path.read_text("utf-8")
    start, stop = "<!-- table -->\n", "<!-- end of table -->"
    head, _, rest = text.partition(start)
    _, _, tail = rest.partition(stop)
    path.write_text(f"{head}{start}\n{table}\n\n{stop}{tail}", "utf-8")


if __name__ == "__main__":
    main()
