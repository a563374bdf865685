"""Restart services ten thousand times; the daemon must not grow.

    python -m bench.restarts_10k [--restarts 10000] [--services 8]

The services run /bin/true without backoff and with an unreachable crash-loop limit. Memory, descriptors and threads of the
daemon are read from /proc. The first half is warm-up (caches, bounded journals and indexes fill up); a line is fitted to
the rest. Fails if memory grows by more than BYTES_PER_RESTART, or if descriptors or threads grow.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from bench.rig import RunningFleet, scratch
from tests.support.ports import free_port
from tests.support.waiting import until

BYTES_PER_RESTART = 250.0  # what allocators and slow rings were seen to take in 25,000 restarts: 120
STEPS = 50
DESCRIPTORS = 16  # the ends of a spawn and of a log of each service may happen to be open at the moment of a sample


@dataclass(frozen=True, slots=True)
class Sample:
    restarts: int
    rss_bytes: int
    descriptors: int
    threads: int


def sample(pid: int, restarts: int) -> Sample:
    text = Path(f"/proc/{pid}/status").read_text()
    rss = re.search(r"VmRSS:\s+(\d+)", text)
    threads = re.search(r"Threads:\s+(\d+)", text)
    assert rss is not None
    assert threads is not None
    return Sample(restarts, int(rss[1]) << 10, len(list(Path(f"/proc/{pid}/fd").iterdir())), int(threads[1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--restarts", type=int, default=10_000)
    parser.add_argument("--services", type=int, default=8)
    asked = parser.parse_args()
    backoff = {"initial": "0ms", "max": "0ms", "jitter": 0}
    restart = {"policy": "always", "backoff": backoff, "crash_loop": {"count": 100_000, "window": "1s"}}
    services = {f"true-{n}": {"command": ["/bin/true"], "restart": restart} for n in range(asked.services)}
    with scratch("restarts") as folder:
        with RunningFleet(folder, f"services: {json.dumps(services)}\n", free_port()) as fleet:
            began = time.monotonic()
            samples = measured(fleet, asked.restarts)
            took_s = time.monotonic() - began
        kept = sum(path.stat().st_blocks * 512 for path in (folder / "state").rglob("*") if path.is_file())
        logs = sum(path.stat().st_blocks * 512 for path in (folder / "logs").rglob("*") if path.is_file())
        wrong = [line for line in (folder / "fleetd.log").read_text().splitlines() if "Traceback" in line]
    report(samples, took_s, kept, logs, wrong)


def measured(fleet: RunningFleet, wanted: int) -> list[Sample]:
    """Watch until so many restarts are counted; return a sample for each step."""
    samples: list[Sample] = []

    def counted() -> int:
        return sum(row["restarts"] for row in fleet.status()["processes"])

    for step in range(STEPS + 1):
        goal = wanted * step // STEPS
        until(lambda goal=goal: counted() >= goal, f"{goal} restarts", 600, period_s=0.05)  # type: ignore[misc]
        samples.append(sample(fleet.pid, counted()))
    return samples


def report(samples: list[Sample], took_s: float, kept: int, logs: int, wrong: list[str]) -> None:
    warm = samples[len(samples) // 2 :]
    slope = statistics.linear_regression([s.restarts for s in warm], [s.rss_bytes for s in warm]).slope
    half = len(warm) // 2
    descriptors = [max(s.descriptors for s in part) for part in (warm[:half], warm[half:])]
    threads = [max(s.threads for s in part) for part in (warm[:half], warm[half:])]
    total = samples[-1].restarts
    print(f"{total} restarts in {took_s:.0f} s: {total / took_s:.0f} a second")
    print(
        f"memory {samples[0].rss_bytes >> 10} KiB at first, {warm[0].rss_bytes >> 10} warm, {warm[-1].rss_bytes >> 10} at last:"
        f" {slope:+.1f} bytes per restart"
    )
    print(f"descriptors at most {descriptors[0]}, then {descriptors[1]}; threads {threads[0]}, then {threads[1]}")
    print(f"on disk: state {kept >> 10} KiB, logs {logs >> 10} KiB")
    found = [f"the daemon says: {line[:300]}" for line in wrong[:3]]
    if slope > BYTES_PER_RESTART:
        found.append(f"memory grows by {slope:.0f} bytes per restart")
    if descriptors[1] > descriptors[0] + DESCRIPTORS:
        found.append("descriptors grow")
    if threads[1] > threads[0] + 2:
        found.append("threads grow")
    for sentence in found:
        print(f"WRONG: {sentence}")
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
