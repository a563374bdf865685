"""What the daemon itself costs: memory with 20 services, processor time when idle, `fleetctl status`.

python -m bench.daemon [--idle 30]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from bench.rig import RunningFleet, free_port, scratch, summary, wait_until

_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """Return the user and system seconds a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / _TICKS


def rss_bytes(pid: int) -> int:
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--idle", type=float, default=30.0, help="seconds to watch the idle daemon")
    asked = parser.parse_args()
    entries = "\n".join(f"  service-{index:02}: {{command: [/bin/sleep, '86400']}}" for index in range(20))
    with scratch("daemon") as folder, RunningFleet(folder, f"services:\n{entries}\n", free_port()) as fleet:
        wait_until(lambda: all(p["state"] == "READY" for p in fleet.status()["processes"]), "20 services")
        before, began = cpu_s(fleet.pid), time.monotonic()
        wait_until(
            lambda: time.monotonic() - began >= asked.idle, "the idle time", deadline_s=asked.idle + 60, period_s=0.5
        )
        share = (cpu_s(fleet.pid) - before) / (time.monotonic() - began)
        print(f"resident memory with 20 services   {rss_bytes(fleet.pid) / 2**20:.1f} MiB")
        print(f"processor when idle                {share * 100:.2f} % of a core over {asked.idle:g} s")
        took: list[float] = []
        script = Path(sys.executable).with_name("fleetctl")
        for _ in range(15):
            at = time.monotonic()
            subprocess.run(
                [str(script), "--socket", str(fleet.socket), "status"], check=True, stdout=subprocess.DEVNULL
            )
            took.append(time.monotonic() - at)
        print(f"fleetctl status                    {summary(took)}")


if __name__ == "__main__":
    main()
