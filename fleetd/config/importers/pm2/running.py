"""Find apps that a running PM2 supervises and that would run twice.

Invariants:
- PM2 is queried only when its daemon listens: its command line would start one otherwise.
"""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fleetd.config.importers import nodejs
from fleetd.units import expand_home

ANSWER_S = 15.0
_CONNECT_S = 1.0


def running() -> Any:
    """Return the output of `pm2 jlist`; None if no PM2 of this user runs or answers."""
    program = shutil.which("pm2")
    home = Path(expand_home(os.environ.get("PM2_HOME") or "~/.pm2"))
    if program is None or not _listens(home / "rpc.sock"):
        return None
    try:
        _, output, _ = asyncio.run(nodejs.run((program, "jlist", "--silent"), ANSWER_S))
        return json.loads(output[output.find("[{") :])
    except (OSError, ValueError):
        return None


def _listens(path: Path) -> bool:
    try:
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(_CONNECT_S)
            connection.connect(str(path))
    except OSError:
        return False
    return True


def still_running(jlist: Any, data: Mapping[str, Any]) -> list[str]:
    """Return a warning for every app that PM2 runs and the fleet would run too: a bot must not run twice.

    `jlist` is the parsed output of `pm2 jlist`; `data` is a fleet as plain data (`Imported.data`, or a parsed fleet.yaml).
    """
    ours = {**(data.get("services") or {}), **(data.get("instances") or {})}
    found = []
    for process in jlist if isinstance(jlist, list) else ():
        env = process.get("pm2_env") if isinstance(process, dict) else None
        if not isinstance(env, dict) or env.get("status") not in ("online", "launching", "waiting restart"):
            continue
        name = str(process.get("name") or env.get("name"))
        same = (key for key, entry in ours.items() if _same_program(env, entry))
        match = name if name in ours else next(same, None)
        if match is not None:
            todo = f"pm2 delete {json.dumps(name) if ' ' in name else name} && pm2 save"
            found.append(f"PM2 still runs {name} (pid {process.get('pid')}), which is {match} here: {todo}")
    return found


def _same_program(env: Mapping[str, Any], entry: Any) -> bool:
    words = entry.get("command") if isinstance(entry, dict) else None
    script, folder = str(env.get("pm_exec_path") or ""), str(entry.get("cwd") or "") if isinstance(entry, dict) else ""
    if not script or not isinstance(words, list) or (folder and folder != str(env.get("pm_cwd") or "")):
        return False
    return any(os.path.normpath(Path(folder) / str(word)) == script for word in words)
