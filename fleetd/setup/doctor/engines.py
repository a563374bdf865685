"""Checks of engines: their programs, versions and libraries, the ports of the fleet, and a second Ollama.

Pure: every check reads facts alone.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from fleetd.setup.doctor.facts import Facts
from fleetd.setup.doctor.findings import Finding, Severity, failed, passed, warned
from fleetd.units import counted, listed

Version = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class KnownBad:
    """Versions from `since` up to, not including, `fixed` have this fault. `broken`: fleetd cannot work with them."""

    fixed: Version
    why: str
    since: Version = ()
    broken: bool = False


KNOWN_BAD: Mapping[str, tuple[KnownBad, ...]] = {
    "ollama": (
        KnownBad((0, 5, 5), "too old: its API cannot build models from files", broken=True),
        KnownBad((0, 17, 1), "CVE-2026-7482: a model file reads the server's memory"),
        KnownBad((0, 20, 3), "CVE-2026-7020: a model leaves its folder"),
        KnownBad((0, 35, 0), "CVE-2026-103663: a pull writes any file", since=(0, 34, 2)),
    ),
    "vllm": (
        KnownBad((0, 8, 0), "too old for the options of fleetd", broken=True),
        KnownBad((0, 14, 1), "CVE-2026-22778: an image in a request runs code", since=(0, 8, 3)),
        KnownBad((0, 16, 0), "sleep mode does not work", since=(0, 14, 0)),
    ),
}
UPGRADE: Mapping[str, str] = {
    "ollama": "curl -fsSL https://ollama.com/install.sh | sh   # macOS: brew upgrade ollama",
    "vllm": "pip install --upgrade vllm",
    "llama-server": "brew upgrade llama.cpp, or build a newer one",
}
USED_BY: Mapping[str, str] = {
    "ollama": "ollama",
    "vllm": "vllm",
    "llama-server": "llamacpp",
    "lms": "lmstudio",
}


def version_of(text: str | None) -> Version | None:
    """Return the numbers of a version; None if there are none. A release candidate counts as its release."""
    found = re.match(r"v?(\d+)\.(\d+)(?:\.(\d+))?", text or "")
    return tuple(int(part or 0) for part in found.groups()) if found else None


def programs(facts: Facts) -> Iterator[Finding]:
    """Judge whether every program of the fleet can be run, by this user and by the service."""
    good = 0
    for program in facts.programs:
        users = listed(program.processes)
        if program.problem is not None:
            fix = program.hint or f"command -v {shlex.quote(program.name)}; set command: to its full path"
            yield failed("programs", f"{program.problem} (needed by {users})", fix)
        elif program.missing_for_service:
            text = f"{program.name} is not on the PATH in the service's file, and is needed by {users}"
            own = " --user" if facts.service.kind == "user" else ""
            yield failed(
                "programs.service", text, f"fleetctl install-service{own}   # from a shell that finds {program.name}"
            )
        else:
            good += 1
    if good:
        yield passed("programs", f"{counted(good, 'program')} found")


def versions(facts: Facts) -> Iterator[Finding]:
    """Judge the versions of the installed engines."""
    for program in facts.installed:
        used = USED_BY.get(program.name) in facts.engines
        shown = f"{program.name} {program.version or 'of an unknown version'}"
        version = version_of(program.version)
        bad = [
            one
            for one in KNOWN_BAD.get(program.name, ())
            if version and version > (0, 0, 0) and one.since <= version < one.fixed
        ]
        if bad:
            broken = any(one.broken for one in bad) and used
            least = ".".join(map(str, max(one.fixed for one in bad)))
            text = f"{shown}: {'; '.join(one.why for one in bad)} (fixed in {least})"
            verdict = Severity.FAIL if broken else Severity.WARN
            yield Finding(f"versions.{program.name}", verdict, text, UPGRADE[program.name])
        elif program.lacks:
            text = f"{shown} does not list {listed(program.lacks)}, which fleetd passes"
            yield warned(f"versions.{program.name}", text, UPGRADE["llama-server"])
        else:
            yield passed(f"versions.{program.name}", f"{shown} ({program.path})")
    if facts.python < (3, 11):
        text = f"Python {facts.python[0]}.{facts.python[1]}: fleetd needs 3.11"
        yield failed("versions.python", text, "pipx reinstall --python python3.13 fleetd")


def library(facts: Facts) -> Iterator[Finding]:
    """Judge the wheel of llama.cpp: it needs GNU OpenMP, which a bare machine lacks."""
    found = facts.library
    if not found.installed:
        return
    if found.problem is None:
        yield passed("llamacpp", "the embedded llama.cpp loads")
        return
    say = failed if found.needed else warned
    if "libgomp" in found.problem:
        yield say(
            "llamacpp",
            f"GNU OpenMP is missing: {found.problem}",
            "sudo apt-get install libgomp1   # Fedora: sudo dnf install libgomp",
        )
    else:
        yield say(
            "llamacpp",
            f"the embedded llama.cpp does not load: {found.problem}",
            "pip install --force-reinstall xllamacpp",
        )


def ports(facts: Facts) -> Iterator[Finding]:
    """Judge whether the ports of the fleet are free, or its own."""
    good = 0
    for port in facts.ports:
        if port.free or port.ours:
            good += 1
            continue
        users = listed(port.users)
        who = port.owner or "another program"
        text = f"port {port.port}, wanted by {users}, is taken by {who}"
        if port.owner_pid is not None:
            fix = f"kill {port.owner_pid}   # or give {port.users[0]} another port"
        else:
            look = f"sudo ss -ltnp 'sport = :{port.port}'"
            fix = look if facts.platform == "linux" else f"sudo lsof -nP -iTCP:{port.port} -sTCP:LISTEN"
        yield failed("ports", text, fix)
    if good:
        yield passed("ports", f"{counted(good, 'port')} free or in use by this fleet")


def ollama(facts: Facts) -> Iterator[Finding]:
    """Judge Ollama's own service next to servers that fleetd starts: both load into one memory."""
    found = facts.ollama
    if found.unit is None:
        if found.engine:
            yield passed("ollama", "Ollama's own service does not run")
        return
    if not found.engine:
        if found.external:
            yield passed("ollama", f"Ollama's own service runs ({found.unit}), and fleet.yaml uses it")
        return
    text = f"Ollama's own service runs ({found.unit}) next to the servers of fleetd: it loads models into the same memory, uncounted"
    if facts.platform == "darwin":
        fix = "brew services stop ollama" if "homebrew" in found.unit else "osascript -e 'quit app \"Ollama\"'"
    else:
        fix = "systemctl --user disable --now ollama" if found.user_unit else "sudo systemctl disable --now ollama"
    yield warned("ollama", text, fix)
