"""One interface to three supervisors, so that a scenario runs on each: fleetd, supervisord, PM2.

Invariants:
- Each supervisor gets the settings that its documentation recommends for the case, never worse than its defaults.
- All files are in a scratch folder. A marker in the command line identifies the processes of a scenario; all of them are
  killed at the end.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.rig import DEADLINE_S, RunningFleet
from tests.support.ports import free_port
from tests.support.waiting import until

NAME = "app"


@dataclass(frozen=True, slots=True)
class Job:
    """What to supervise. Sizes in bytes, times in seconds."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    rotate_bytes: int = 0
    stop_s: int = 3
    restart_at_once: bool = False


def marked(marker: str) -> set[int]:
    """Return the pids of living processes with the marker in their command line."""
    found: set[int] = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            with suppress(OSError):
                if marker.encode() in (entry / "cmdline").read_bytes():
                    found.add(int(entry.name))
    return found


def end(pids: set[int]) -> None:
    for pid in pids:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


class Supervisor:
    """One supervisor with one job. `title` names it in the table."""

    title = ""

    def __init__(self, folder: Path, job: Job) -> None:
        self.folder, self.job = folder, job

    @classmethod
    def why_not(cls) -> str | None:
        """Return why it cannot be tried here."""
        return None

    def start(self) -> None:
        raise NotImplementedError

    def stop_job(self) -> None:
        """Stop the job as a user would, and wait until the supervisor calls it stopped."""
        raise NotImplementedError

    def state(self) -> str:
        """Return what the supervisor says about the job, in its own word."""
        raise NotImplementedError

    def logs(self) -> list[Path]:
        """Return the files of the job's output, oldest first."""
        raise NotImplementedError

    def crash(self) -> None:
        """kill -9 the supervisor, and start it again as its documentation says."""
        raise NotImplementedError

    def pid(self) -> int:
        raise NotImplementedError

    def close(self) -> None:
        raise NotImplementedError


class Fleetd(Supervisor):
    title = "fleetd"
    capture = "file"

    def start(self) -> None:
        restart: dict[str, Any] = {"policy": "always"}
        if self.job.restart_at_once:
            restart |= {"backoff": {"initial": "0ms", "max": "0ms", "jitter": 0}}
            restart |= {"crash_loop": {"count": 100_000, "window": "1m"}}
        service = {
            "command": list(self.job.command),
            "env": dict(self.job.env),
            "restart": restart,
            "stop": {"timeout": f"{self.job.stop_s}s"},
            "logs": {
                "max_size": self.job.rotate_bytes or 1 << 30,
                "keep": 100,
                "compress": False,
                "capture": self.capture,
            },
        }
        self.fleet = RunningFleet(self.folder, f"services: {json.dumps({NAME: service})}\n", free_port())
        self.fleet.__enter__()

    def stop_job(self) -> None:
        self.fleet.ctl("stop", NAME)

    def state(self) -> str:
        return str(self.fleet.named("processes", NAME)["state"])

    def logs(self) -> list[Path]:
        folder = self.folder / "logs"
        current = folder / f"{NAME}.log"
        rotated = sorted(path for path in folder.glob(f"{NAME}.log*") if path != current)
        return [*sorted(rotated, key=_age), current]

    def crash(self) -> None:
        os.kill(self.pid(), signal.SIGKILL)
        assert self.fleet.process is not None
        self.fleet.process.wait()
        self.fleet.__enter__()

    def pid(self) -> int:
        return self.fleet.pid

    def close(self) -> None:
        self.fleet.__exit__()


class FleetdPipe(Fleetd):
    title = "fleetd, capture: pipe"
    capture = "pipe"


def _age(path: Path) -> tuple[int, float]:
    """Oldest first: by modification, and of equal ones the higher number."""
    number = path.name.rsplit(".", 1)[1]
    return (-int(number) if number.isdigit() else 0, path.stat().st_mtime)


class Supervisord(Supervisor):
    title = "supervisord"

    @classmethod
    def why_not(cls) -> str | None:
        return None if shutil.which("supervisord") else "supervisord is not on PATH"

    def start(self) -> None:
        environment = ",".join(f'{key}="{value}"' for key, value in self.job.env.items())
        quick = "startsecs=0\nautorestart=true\n" if self.job.restart_at_once else "startsecs=1\nautorestart=true\n"
        (self.folder / "supervisord.conf").write_text(
            f"[unix_http_server]\nfile={self.folder}/s.sock\n"
            "[rpcinterface:supervisor]\nsupervisor.rpcinterface_factory=supervisor.rpcinterface:make_main_rpcinterface\n"
            f"[supervisorctl]\nserverurl=unix://{self.folder}/s.sock\n"
            f"[supervisord]\nnodaemon=true\nlogfile={self.folder}/s.log\npidfile={self.folder}/s.pid\n"
            f"[program:{NAME}]\ncommand={' '.join(self.job.command)}\nenvironment={environment}\n{quick}"
            f"stopasgroup=true\nkillasgroup=true\nstopwaitsecs={self.job.stop_s}\nredirect_stderr=true\n"
            f"stdout_logfile={self.folder}/app.log\nstdout_logfile_maxbytes={self.job.rotate_bytes}\nstdout_logfile_backups=100\n"
        )
        self._run()

    def _run(self) -> None:
        self.process = subprocess.Popen(
            ["supervisord", "-c", str(self.folder / "supervisord.conf")],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        until((self.folder / "s.sock").exists, "supervisord answers")

    def _ctl(self, *words: str) -> str:
        command = ["supervisorctl", "-c", str(self.folder / "supervisord.conf"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=DEADLINE_S, check=False).stdout

    def stop_job(self) -> None:
        self._ctl("stop", NAME)

    def state(self) -> str:
        return ([*self._ctl("status", NAME).split(), "?", "?"])[1]

    def logs(self) -> list[Path]:
        current = self.folder / "app.log"
        rotated = (path for path in self.folder.glob("app.log.*") if path.suffix[1:].isdigit())
        return [*sorted(rotated, key=lambda path: -int(path.suffix[1:])), current]

    def crash(self) -> None:
        self.process.kill()
        self.process.wait()
        (self.folder / "s.sock").unlink(missing_ok=True)
        self._run()

    def pid(self) -> int:
        return self.process.pid

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        self.process.wait(timeout=DEADLINE_S)


class Pm2(Supervisor):
    title = "PM2"

    @classmethod
    def why_not(cls) -> str | None:
        return None if shutil.which("pm2") else "pm2 is not on PATH"

    def _pm2(self, *words: str) -> str:
        environment = {**os.environ, "PM2_HOME": str(self.folder / "pm2")}
        command = ["pm2", *words]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=DEADLINE_S, check=False
        ).stdout

    def start(self) -> None:
        app = {
            "name": NAME,
            "script": self.job.command[0],
            "args": list(self.job.command[1:]),
            "interpreter": "none",
            "cwd": str(self.folder),
            "env": dict(self.job.env),
            "out_file": str(self.folder / "app.log"),
            "error_file": str(self.folder / "app.err"),
            "merge_logs": True,
            "kill_timeout": self.job.stop_s * 1000,
            **({"max_restarts": 100_000} if self.job.restart_at_once else {}),
        }
        (self.folder / "app.json").write_text(json.dumps({"apps": [app]}))
        self._pm2("start", str(self.folder / "app.json"))
        self._pm2("save")

    def stop_job(self) -> None:
        self._pm2("stop", NAME)

    def state(self) -> str:
        text = self._pm2("jlist")
        found = json.loads(text[text.index("[{") :]) if "[{" in text else []
        return str(found[0]["pm2_env"]["status"]) if found else "?"

    def logs(self) -> list[Path]:
        return [self.folder / "app.log"]

    def crash(self) -> None:
        pid = self.pid()
        os.kill(pid, signal.SIGKILL)
        until(lambda: not Path(f"/proc/{pid}").exists(), "PM2 is dead")
        self._pm2("resurrect")

    def pid(self) -> int:
        return int((self.folder / "pm2" / "pm2.pid").read_text())

    def close(self) -> None:
        self._pm2("kill")


def python(*words: str) -> tuple[str, ...]:
    return (sys.executable, "-I", "-S", *words)
