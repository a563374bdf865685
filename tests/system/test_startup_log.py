"""Long starts: phases in `status`, deadlines extended by progress, values learned for the next start."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
from pathlib import Path

import psutil

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.waiting import until

KV = str(int(0.99 * 2**30))  # of the 1.00 GiB that the fake reports


def fleet(*flags: str, options: str = "", more: str = "") -> str:
    command = fake("--model", "m", *flags, api="vllm")
    return f"""
    models:
      m:
        engine: vllm
        command: {command}
        device: host
        memory: 10MiB
        options: {{model: org/m, gpu_memory_utilization: 0.5{options}}}
        {more}
    """


def started_with(daemon: Fleetd) -> list[str]:
    return psutil.Process(daemon.process_row("m")["pid"]).cmdline()


def test_start_phase_is_shown_while_it_lasts(tmp_path: Path) -> None:
    script = 'echo Starting to load model m; sleep 2; echo torch.compile took 9 s; sleep 2; exec "$@"'
    slow = fleet(more="preload: true").replace("command: [", f"command: [sh, -c, {json.dumps(script)}, sh, ")
    with fleetd(tmp_path, slow).start(wait=False) as daemon:
        until(daemon.is_up, "the daemon is up")
        seen: list[str] = []

        def ready() -> bool:
            row = daemon.process_row("m")
            if row["reason"] not in seen:
                seen.append(row["reason"])
            return bool(row["state"] == "READY")

        until(ready, "it is ready")
        phases = [reason for reason in seen if reason.startswith("starting: ")]
        assert phases[:2] == ["starting: loading weights", "starting: compiling"], seen
        story = json.dumps(daemon.control("GET", "/v1/story/m").json)
        assert "compiling" in story


def test_learned_start_values_survive_a_daemon_restart(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet(more="preload: true")).start() as daemon:
        first = daemon.until_state("m", "READY")
        assert KV not in started_with(daemon)
        until(lambda: "kv_cache_memory" in daemon.log(), "it is learned")
        daemon.write(fleet(more="preload: true, ttl: 1h".replace(", ", "\n        ")))
        until(lambda: daemon.model_row("m")["ttl_s"] == 3600.0, "the edit is applied")
        assert daemon.process_row("m")["pid"] == first["pid"]  # a learned value restarts nothing
        os.kill(first["pid"], signal.SIGKILL)
        until(lambda: daemon.process_row("m")["generation"] == 2, "it is started again")
        daemon.until_state("m", "READY")
        assert KV in started_with(daemon)
        pid = daemon.process_row("m")["pid"]
        daemon.signal(signal.SIGKILL)
        daemon.wait()
        daemon.start()
        assert daemon.until_state("m", "READY")["pid"] == pid
        daemon.stop()
        daemon.start()
        daemon.until_state("m", "READY")
        assert KV in started_with(daemon)


def test_failed_start_forgets_learned_values(tmp_path: Path) -> None:
    with fleetd(tmp_path, fleet(more="preload: true")).start() as daemon:
        daemon.until_state("m", "READY")
        until(lambda: "kv_cache_memory" in daemon.log(), "it is learned")
        daemon.stop()
    path = tmp_path / "state" / "fleetd.db"
    database = sqlite3.connect(path)
    try:
        ((_, value),) = database.execute("SELECT key, value FROM fact WHERE key LIKE 'start:%'").fetchall()
        assert json.loads(value) == {"kv_cache_memory": int(KV)}
        failing = tmp_path / "failing.py"
        failing.write_text(
            "import os, sys\n"
            "if '--kv-cache-memory-bytes' in sys.argv:\n"
            "    print('torch.OutOfMemoryError: CUDA out of memory.'); sys.exit(1)\n"
            "os.execv(sys.executable, [sys.executable, '-I', *sys.argv[1:]])\n"
        )
    finally:
        database.close()
    # the same entry with another program: the hash covers the command, so learned values start again
    again = fleet(more="preload: true").replace('"-I", ', f'"{failing}", ')
    with fleetd(tmp_path, again).start() as daemon:
        daemon.until_state("m", "READY")
        until(lambda: "kv_cache_memory" in daemon.log(), "it is learned")
        os.kill(daemon.process_row("m")["pid"], signal.SIGKILL)
        until(lambda: daemon.process_row("m")["generation"] == 3, "it failed with it, and is started without")
        daemon.until_state("m", "READY")
        assert KV not in started_with(daemon)
        assert "discarded the values that an earlier start learned" in daemon.log()
