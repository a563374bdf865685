"""A machine for a test: Debian with systemd as process 1, in a container.

Invariants:
- debootstrap creates the root file system once in a cache outside the repository (FLEETD_TEST_CACHE, else
  ~/.cache/fleetd-tests); every use gets a copy; no image is pulled.
- It needs root, `podman`, `runc` and `debootstrap`; `why_not()` returns the missing ones.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
CACHE = Path(os.environ.get("FLEETD_TEST_CACHE", Path.home() / ".cache" / "fleetd-tests"))
PACKAGES = "systemd,systemd-sysv,dbus,python3,python3-venv,procps"
PODMAN = ("podman", "--storage-driver=vfs", "--cgroup-manager=cgroupfs", "--runtime=runc")
# The defaults ask for higher limits than a nested machine may set.
CONTAINERS_CONF = '[containers]\ndefault_ulimits = ["nofile=20000:20000", "nproc=4096:4096"]\n'


def why_not() -> str | None:
    """Return why no container can be had here; None: it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in ("podman", "runc", "debootstrap") if shutil.which(program) is None]
    return f"needs {', '.join(missing)}" if missing else None


def run(*words: str, check: bool = True, timeout_s: float = 600, **more: str) -> str:
    """Run a command on the host; return its output. Raises RuntimeError with the output when it fails."""
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=timeout_s, check=False, env={**os.environ, **more}
    )
    if check and done.returncode:
        raise RuntimeError(f"{' '.join(words)}: exit {done.returncode}\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.stdout


def base_root() -> Path:
    """Return the cached root file system, made when it is not there."""
    root = CACHE / "debian-systemd"
    if not (root / "made").exists():
        shutil.rmtree(root, ignore_errors=True)
        root.parent.mkdir(parents=True, exist_ok=True)
        run("debootstrap", "--variant=minbase", f"--include={PACKAGES}", "bookworm", str(root))
        (root / "made").touch()
    return root


def build_wheel(into: Path) -> None:
    """Build this project's wheel."""
    run(sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(into), str(REPOSITORY))


def install_wheels(folder: Path, into: Path) -> None:
    """Install the wheel and all that it depends on into the packages of the container's Python 3.11, from outside of it."""
    (wheel,) = folder.glob("fleetd-*.whl")
    only = ("--only-binary=:all:", "--python-version", "3.11", "--target", str(into))
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-warn-script-location", *only, str(wheel))
    for script in (into / "bin").iterdir():  # made for the Python that installed them
        text = script.read_text()
        installed = into.parents[2] / "bin" / script.name
        installed.write_text("#!/opt/fleetd/bin/python3\n" + text.partition("\n")[2])
        installed.chmod(0o755)


class Machine:
    """A running container."""

    def __init__(self, name: str, root: Path, environment: dict[str, str]) -> None:
        self.name, self.root, self.environment = name, root, environment

    def sh(self, script: str, check: bool = True, timeout_s: float = 120) -> str:
        """Run a shell script inside; return its output. Raises RuntimeError when it fails and `check` is set."""
        return run(
            *PODMAN, "exec", self.name, "sh", "-c", script, check=check, timeout_s=timeout_s, **self.environment
        ).strip()

    def until(self, script: str, deadline_s: float = 60) -> str:
        """Run a script inside until it succeeds; return its output. Raises TimeoutError with its last output."""
        end = time.monotonic() + deadline_s
        while True:
            done = subprocess.run(
                [*PODMAN, "exec", self.name, "sh", "-c", script],
                capture_output=True,
                text=True,
                check=False,
                env={**os.environ, **self.environment},
            )
            if done.returncode == 0:
                return done.stdout.strip()
            if time.monotonic() > end:
                raise TimeoutError(f"{script!r} did not hold within {deadline_s:g} s: {done.stdout}{done.stderr}")


@contextmanager
def systemd_machine() -> Iterator[Machine]:
    """Yield a container in which systemd says that it runs, with fleetd's wheel in /wheels."""
    base = base_root()
    with tempfile.TemporaryDirectory(prefix="fleetd-systemd-", dir=CACHE) as folder:
        root = Path(folder) / "root"
        run("cp", "-a", str(base), str(root))
        (root / "wheels").mkdir()
        build_wheel(root / "wheels")
        conf = Path(folder) / "containers.conf"
        conf.write_text(CONTAINERS_CONF)
        environment = {"CONTAINERS_CONF": str(conf)}
        name = f"fleetd-test-{os.getpid()}"
        start = (
            "run",
            "-d",
            "--name",
            name,
            "--systemd=always",
            "--privileged",
            "--network=none",
            "--rootfs",
            str(root),
        )
        run(*PODMAN, *start, "/sbin/init", **environment)
        machine = Machine(name, root, environment)
        try:
            machine.until("systemctl is-system-running | grep -qE 'running|degraded'")
            yield machine
        finally:
            run(*PODMAN, "rm", "-f", "-t", "1", name, check=False, **environment)
