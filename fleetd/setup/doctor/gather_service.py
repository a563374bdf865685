"""Facts of the service managers: fleetd's own service in systemd or launchd, and a service of Ollama.

Invariants:
- Programs are run by a function that is an argument, and files are read below the given home: a test gives its own.
- Nothing is started, enabled or loaded.
"""

from __future__ import annotations

import plistlib
import re
import shlex
import shutil
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from fleetd.host.process.ask import ask
from fleetd.host.process.process_set import STATE_VARIABLE
from fleetd.host.process.table import command_of, system_table
from fleetd.setup.doctor.daemon import LABEL
from fleetd.setup.doctor.facts import OllamaFact, ServiceFact
from fleetd.setup.programs import Ask

ASK_S = 3.0
SYSTEM_UNITS = (
    "/etc/systemd/system/fleetd.service",
    "/usr/local/lib/systemd/system/fleetd.service",
    "/usr/lib/systemd/system/fleetd.service",
)
APPLE_JOBS = ("homebrew.mxcl.ollama", "com.ollama.ollama", "application.com.electron.ollama")


def init_system(platform: str = sys.platform, root: Path = Path("/")) -> str:
    """Return systemd, launchd or none."""
    if platform == "darwin":
        return "launchd"
    return "systemd" if (root / "run/systemd/system").is_dir() else "none"


# -- systemd ---------------------------------------------------------------------------------------------------------------


def systemd(home: Path, user: str, ask: Ask = ask, root: Path = Path("/")) -> tuple[ServiceFact, str | None]:
    """Return the unit of fleetd, and the PATH that is written in it."""
    places = [("user", home / ".config/systemd/user/fleetd.service")]
    places += [("system", root / name.lstrip("/")) for name in SYSTEM_UNITS]
    kind, path = next(((kind, path) for kind, path in places if path.is_file()), (None, None))
    if kind is None or path is None:
        return ServiceFact("systemd", user=user), None
    unit = unit_of(path.read_text("utf-8", "replace"))
    own = ("--user",) if kind == "user" else ()
    shown = properties(
        ask(("systemctl", *own, "show", "fleetd", "-p", "ActiveState,SubState,UnitFileState"), ASK_S).text
    )
    state = shown.get("ActiveState")
    linger = properties(ask(("loginctl", "show-user", user, "-p", "Linger"), ASK_S).text).get("Linger")
    program = unit["program"]
    fact = ServiceFact(
        "systemd",
        kind=kind,
        path=str(path),
        active=None if state is None else state == "active",
        enabled=None if "UnitFileState" not in shown else shown["UnitFileState"].startswith(("enabled", "static")),
        state=state,
        linger=_linger(linger, user, root) if kind == "user" else None,
        user=user,
        config=unit["config"],
        program=program,
        program_found=program is None or shutil.which(program) is not None,
    )
    return fact, unit["path"]


def _linger(answer: str | None, user: str, root: Path) -> bool:
    return answer == "yes" or (root / "var/lib/systemd/linger" / user).exists()


def unit_of(text: str) -> dict[str, str | None]:
    """Return the program, configuration and PATH in the text of a unit."""
    start = re.search(r"^ExecStart=(.*)$", text, re.MULTILINE)
    words = _words(start[1]) if start else []
    path = re.search(r'^Environment="?PATH=([^"\n]*)"?$', text, re.MULTILINE)
    return {
        "program": words[0] if words else None,
        "config": _after(words, "--config"),
        "path": path[1].replace("%%", "%") if path else None,
    }


def _words(text: str) -> list[str]:
    try:
        words = shlex.split(text)
    except ValueError:
        return []
    return [word.replace("%%", "%").replace("$$", "$") for word in words]


def _after(words: list[str], flag: str) -> str | None:
    return words[words.index(flag) + 1] if flag in words[:-1] else None


def properties(text: str) -> dict[str, str]:
    """Return the lines NAME=VALUE that `systemctl show` prints."""
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {name: value for name, _, value in pairs if name.isidentifier()}


# -- launchd ---------------------------------------------------------------------------------------------------------------


def launchd(home: Path, user: str, uid: int, ask: Ask = ask, root: Path = Path("/")) -> tuple[ServiceFact, str | None]:
    """Return the job of fleetd, and the PATH that is written in its property list."""
    places = [
        ("user", home / f"Library/LaunchAgents/{LABEL}.plist"),
        ("system", root / f"Library/LaunchDaemons/{LABEL}.plist"),
    ]
    kind, path = next(((kind, path) for kind, path in places if path.is_file()), (None, None))
    if kind is None or path is None:
        return ServiceFact("launchd", user=user), None
    job = _property_list(path)
    words = [str(word) for word in job.get("ProgramArguments", ())]
    domain = f"gui/{uid}" if kind == "user" else "system"
    shown = ask(("launchctl", "print", f"{domain}/{LABEL}"), ASK_S)
    state = re.search(r"^\s*state = (.+)$", shown.text, re.MULTILINE)
    disabled = ask(("launchctl", "print-disabled", domain), ASK_S).text
    off = re.search(rf'"{re.escape(LABEL)}" => (disabled|true)', disabled) is not None
    loaded = shown.code == 0
    program = words[0] if words else None
    variables = job.get("EnvironmentVariables")
    fact = ServiceFact(
        "launchd",
        kind=kind,
        path=str(path),
        active=loaded and state is not None and state[1].strip() == "running",
        enabled=not off,
        state=state[1].strip() if loaded and state else "not loaded",
        user=user,
        config=_after(words, "--config"),
        program=program,
        program_found=program is None or shutil.which(program) is not None,
    )
    baked = variables.get("PATH") if isinstance(variables, Mapping) else None
    return fact, str(baked) if baked else None


def _property_list(path: Path) -> Mapping[str, Any]:
    try:
        found = plistlib.loads(path.read_bytes())
    except (OSError, ValueError, plistlib.InvalidFileException):
        return {}
    return found if isinstance(found, Mapping) else {}


# -- Ollama ----------------------------------------------------------------------------------------------------------------


def ollama(kind: str, ask: Ask = ask, servers: Iterable[tuple[int, bool]] | None = None) -> OllamaFact:
    """Return Ollama's own service. `servers`: the pid of each `ollama serve`, and whether a fleetd started it."""
    if kind == "systemd":
        for own in ((), ("--user",)):
            if ask(("systemctl", *own, "is-active", "--quiet", "ollama"), ASK_S).code == 0:
                return OllamaFact("ollama.service", user_unit=bool(own))
    if kind == "launchd":
        jobs = ask(("launchctl", "list"), ASK_S).text
        found = next((job for job in APPLE_JOBS if job in jobs), None)
        if found is not None:
            return OllamaFact(found)
    strangers = [pid for pid, ours in (_servers() if servers is None else servers) if not ours]
    return OllamaFact(f"ollama serve, pid {strangers[0]}" if strangers else None)


def _servers() -> Iterable[tuple[int, bool]]:
    """Yield each `ollama serve` of this machine, and whether a fleetd started it; one that cannot be seen is left out."""
    table, mark = system_table(), f"{STATE_VARIABLE}=".encode()
    for entry in table.snapshot().values():
        words = command_of(entry.pid).split()
        environment = table.environment(entry.pid) if len(words) > 1 and _is_ollama(words) else None
        if environment is not None:
            yield entry.pid, any(pair.startswith(mark) for pair in environment.split(b"\0"))


def _is_ollama(words: list[str]) -> bool:
    return Path(words[0]).name.lower() == "ollama" and words[1] == "serve"
