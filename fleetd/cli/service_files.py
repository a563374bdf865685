"""The service files: a systemd unit or a launchd property list, filled in from the templates beside this file.

    python -m fleetd.cli.service_files FOLDER     writes the examples systemd/fleetd.service and launchd/org.fleetd.fleetd.plist

The rules of this file
- The templates are the only source: the examples in the repository are written from them, and a test says so.
- A unit of the system is hardened as far as engines on a GPU bear it; a unit of a user's own session is not, since most of that
  needs rights that the session's systemd has not got.
"""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from string import Template
from xml.sax.saxutils import escape

TEMPLATES = Path(__file__).parent / "templates"
LABEL = "org.fleetd.fleetd"


@dataclass(frozen=True, slots=True)
class ServiceSettings:
    """What is installed: the words that start each program, the configuration, and who runs it (None: the caller's own
    session)."""

    fleetd: tuple[str, ...]
    fleetctl: tuple[str, ...]
    config: str
    path: str
    user: str | None
    home: Path
    socket: str | None = None  # of the daemon, where it is not in a usual place


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """Where it goes, what it holds, and the commands that put it to work."""

    destination: Path
    text: str
    commands: tuple[str, ...]


def native_platform() -> str:
    return "launchd" if sys.platform == "darwin" else "systemd"


def systemd(service: ServiceSettings) -> ServiceFile:
    """Return the unit: in the user's own folder, or, with `user`, a system unit that runs as that user."""
    text = Template((TEMPLATES / "fleetd.service").read_text("utf-8")).substitute(
        fleetd=" ".join(map(_unit_word, service.fleetd)),
        fleetctl=" ".join(map(_unit_word, _fleetctl(service))),
        config=_unit_word(service.config),
        path=_unit_word(f"PATH={service.path}"),
        identity=f"User={service.user}\n" if service.user else "",
        system=_system_part(service.user),
        target="multi-user.target" if service.user else "default.target",
    )
    if service.user:
        return ServiceFile(
            Path("/etc/systemd/system/fleetd.service"),
            text,
            ("systemctl daemon-reload", "systemctl enable --now fleetd"),
        )
    return ServiceFile(
        service.home / ".config/systemd/user/fleetd.service",
        text,
        (
            "systemctl --user daemon-reload",
            "systemctl --user enable --now fleetd",
            "loginctl enable-linger   # so that it starts at boot, without a login",
        ),
    )


def _fleetctl(service: ServiceSettings) -> tuple[str, ...]:
    return (*service.fleetctl, "--socket", service.socket) if service.socket else service.fleetctl


def _system_part(user: str | None) -> str:
    """Return the folders and the hardening of a system unit; root keeps its capabilities, to start processes of other users."""
    if user is None:
        return ""
    text = (TEMPLATES / "fleetd.system.service").read_text("utf-8")
    return text if user in ("root", "0") else text + (TEMPLATES / "fleetd.user.service").read_text("utf-8")


def launchd(service: ServiceSettings) -> ServiceFile:
    """Return the property list: an agent of the user, or, with `user`, a daemon that starts at boot as that user."""
    log = service.home / "Library/Logs/fleetd.log"
    identity = f"  <key>UserName</key><string>{escape(service.user)}</string>\n" if service.user else ""
    text = Template((TEMPLATES / "fleetd.plist").read_text("utf-8")).substitute(
        fleetd="".join(f"<string>{escape(word)}</string>" for word in service.fleetd),
        config=escape(service.config),
        path=escape(service.path),
        home=escape(str(service.home)),
        log=escape(str(log)),
        identity=identity,
    )
    if service.user:
        destination = Path(f"/Library/LaunchDaemons/{LABEL}.plist")
        return ServiceFile(destination, text, (f"launchctl bootstrap system {destination}",))
    destination = service.home / f"Library/LaunchAgents/{LABEL}.plist"
    return ServiceFile(destination, text, (f"launchctl bootstrap gui/{os.getuid()} {destination}",))


def _unit_word(text: str) -> str:
    """Return a word for a unit file: `%` and `$` doubled, quoted when it has to be."""
    plain = text.replace("%", "%%").replace("$", "$$")
    if re.fullmatch(r"[\w@%+=:,./$-]+", plain):
        return plain
    escaped = plain.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'


def write(file: ServiceFile) -> None:
    """Write the file by rename, mode 0644. Raises OSError."""
    file.destination.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.destination.with_name(f".{file.destination.name}.new")
    temporary.write_text(file.text, "utf-8")
    temporary.chmod(0o644)
    temporary.replace(file.destination)


EXAMPLE_UNIT = ServiceSettings(
    fleetd=("/opt/fleetd/bin/fleetd",),
    fleetctl=("/opt/fleetd/bin/fleetctl",),
    config="/etc/fleetd/fleet.yaml",
    path="/opt/fleetd/bin:/usr/local/bin:/usr/bin:/bin",
    user="fleetd",
    home=Path("/var/lib/fleetd"),
    socket="/run/fleetd/fleetd.sock",
)
EXAMPLE_PLIST = ServiceSettings(
    fleetd=("/opt/fleetd/bin/fleetd",),
    fleetctl=("/opt/fleetd/bin/fleetctl",),
    config="/Users/USER/.config/fleetd/fleet.yaml",
    path="/opt/homebrew/bin:/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin",
    user="USER",
    home=Path("/Users/USER"),
)


def examples() -> dict[str, str]:
    """Return the files of the repository that are written from the templates: path in it, and text."""
    return {"systemd/fleetd.service": systemd(EXAMPLE_UNIT).text, f"launchd/{LABEL}.plist": launchd(EXAMPLE_PLIST).text}


if __name__ == "__main__":
    for name, text in examples().items():
        (Path(sys.argv[1]) / name).write_text(text, "utf-8")
