"""Service files: a systemd unit or a launchd property list, rendered from the templates in this package.

    python -m fleetd.cli.service_files FOLDER     write the examples systemd/fleetd.service and launchd/org.fleetd.fleetd.plist

Invariants:
- The templates are the only source: a test compares the examples in the repository with them.
- A system unit is hardened as far as engines on a GPU allow; a user unit is not, since the user's systemd lacks the rights.
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
    """The installed service: the command of each program, the configuration, and its user (None: the caller's
    session)."""

    fleetd: tuple[str, ...]
    fleetctl: tuple[str, ...]
    config: str
    path: str
    user: str | None
    home: Path
    socket: str | None = None  # of the daemon, unless it has a default path


@dataclass(frozen=True, slots=True)
class ServiceFile:
    """The path and text of the file, and the commands that activate it."""

    destination: Path
    text: str
    commands: tuple[str, ...]


def native_platform() -> str:
    return "launchd" if sys.platform == "darwin" else "systemd"


def systemd(service: ServiceSettings) -> ServiceFile:
    """Return the unit: a user unit, or with `user` a system unit that runs as that user."""
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
            "loginctl enable-linger   # starts it at boot, without a login",
        ),
    )


def _fleetctl(service: ServiceSettings) -> tuple[str, ...]:
    return (*service.fleetctl, "--socket", service.socket) if service.socket else service.fleetctl


def _system_part(user: str | None) -> str:
    """Return the folders and hardening of a system unit; root keeps its capabilities to start processes of other users."""
    if user is None:
        return ""
    text = (TEMPLATES / "fleetd.system.service").read_text("utf-8")
    return text if user in ("root", "0") else text + (TEMPLATES / "fleetd.user.service").read_text("utf-8")


def launchd(service: ServiceSettings) -> ServiceFile:
    """Return the property list: a user agent, or with `user` a daemon that starts at boot as that user."""
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
    """Return a word for a unit file: `%` and `$` doubled, quoted when necessary."""
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
    """Return the repository's files that are rendered from the templates, by path."""
    return {"systemd/fleetd.service": systemd(EXAMPLE_UNIT).text, f"launchd/{LABEL}.plist": launchd(EXAMPLE_PLIST).text}


if __name__ == "__main__":
    for name, text in examples().items():
        (Path(sys.argv[1]) / name).write_text(text, "utf-8")
