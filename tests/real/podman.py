"""Images and settings for podman within the limits of another machine.

Invariants:
- The image is created once from the root file system of `container.py`, in a store in the same cache. No image is pulled,
  and the user's own store is not touched.
- The settings are files that podman reads, as on any machine; fleetd does not know them.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from tests.real.container import CACHE, CONTAINERS_CONF, base_root, why_not

IMAGE = "localhost/fleetd-test-python3"
_LEFT_OUT = (
    "proc", "sys", "boot", "var", "usr/share", "usr/sbin", "usr/lib/systemd", "usr/lib/udev", "usr/lib/x86_64-linux-gnu/gconv",
    "usr/lib/x86_64-linux-gnu/perl*", "usr/lib/x86_64-linux-gnu/systemd", "usr/lib/x86_64-linux-gnu/security",
)  # fmt: skip

_ENGINE = '[engine]\ncgroup_manager = "cgroupfs"\nruntime = "runc"\n'


@dataclass(frozen=True, slots=True)
class Podman:
    """podman with its own settings; run it with `environment`."""

    environment: Mapping[str, str]

    def __call__(self, *words: str, check: bool = True) -> str:
        """Run podman; return its output. Raises RuntimeError when it fails and `check` is set."""
        env = {**os.environ, **self.environment}
        done = subprocess.run(["podman", *words], capture_output=True, text=True, timeout=120, check=False, env=env)
        if check and done.returncode:
            raise RuntimeError(f"podman {' '.join(words)}: exit {done.returncode}: {done.stderr[-1000:]}")
        return done.stdout.strip()

    def containers(self) -> list[str]:
        """Return the names of all containers of this store, running or not."""
        return sorted(one["Names"][0] for one in json.loads(self("ps", "--all", "--format", "json") or "[]"))


def podman(folder: Path) -> Podman:
    """Return podman with the image there; `folder` takes its settings."""
    conf, storage = folder / "containers.conf", folder / "storage.conf"
    conf.write_text(CONTAINERS_CONF + _ENGINE)
    store = CACHE / "podman"
    store.mkdir(parents=True, exist_ok=True)
    storage.write_text(f'[storage]\ndriver = "vfs"\ngraphroot = "{store}"\nrunroot = "{folder}/run"\n')
    found = Podman({"CONTAINERS_CONF": str(conf), "CONTAINERS_STORAGE_CONF": str(storage)})
    if IMAGE not in found("images", "--format", "{{.Repository}}"):
        excluded = [f"--exclude=./{path}" for path in _LEFT_OUT]
        with subprocess.Popen(["tar", "-c", *excluded, "-C", str(base_root()), "."], stdout=subprocess.PIPE) as tar:
            done = subprocess.run(
                ["podman", "import", "-", IMAGE], stdin=tar.stdout, check=True, capture_output=True, timeout=300,
                env={**os.environ, **found.environment},
            )  # fmt: skip
            assert done.returncode == 0
    return found


__all__ = ["IMAGE", "Podman", "podman", "why_not"]
