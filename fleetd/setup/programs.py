"""Find the programs of engines on this machine, and their versions, without importing or starting any of them.

Invariants:
- A program is searched where its engine searches it: on PATH, then in the places of its installers.
- The version of a Python program is read from its package's metadata: `vllm --version` imports torch for half a minute.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from fleetd.engines.lmstudio.engine import PLACES as LMSTUDIO_PLACES
from fleetd.engines.ollama.engine import PLACES as OLLAMA_PLACES
from fleetd.engines.program import in_places
from fleetd.host.process.ask import Answered, ask

ASK_S = 4.0
_VERSION = re.compile(r"\d+\.\d+(?:\.\d+)*(?:[-.+]?(?:rc|a|b|dev|post)\d*)?")
_BUILD = re.compile(r"version: (\d+)")  # llama.cpp counts builds

Ask = Callable[[tuple[str, ...], float], Answered]


@dataclass(frozen=True, slots=True)
class Installed:
    """A program of an engine. `on_path`: a daemon with this PATH finds it by its name."""

    name: str
    path: str
    version: str | None = None
    on_path: bool = True
    gpu: bool = False  # llama.cpp alone: it lists a device other than the processor
    lacks: tuple[str, ...] = ()  # flags that fleetd always passes, and its help does not list


# name → (places besides PATH, flag that prints the version; None: a Python package)
PROGRAMS: Mapping[str, tuple[tuple[str, ...], str | None]] = {
    "ollama": (OLLAMA_PLACES, "--version"),
    "llama-server": ((), "--version"),
    "vllm": ((), None),
    "lms": (LMSTUDIO_PLACES, "--version"),
    "mlx_lm.server": ((), None),
}
_PACKAGES = {"vllm": "vllm", "mlx_lm.server": "mlx_lm"}
EMBEDDED = "xllamacpp"
ALWAYS_PASSED = ("--ctx-size", "--parallel", "--alias", "--cache-ram", "--metrics", "--slots", "--offline")


def installed(env: Mapping[str, str], ask: Ask = ask) -> tuple[Installed, ...]:
    """Return the programs of engines that this environment finds. Blocks for seconds."""
    found = [program for name in PROGRAMS if (program := find(name, env, ask)) is not None]
    if (wheel := embedded()) is not None:
        found.append(wheel)
    return tuple(found)


def find(name: str, env: Mapping[str, str], ask: Ask = ask) -> Installed | None:
    """Return one program; None if it is nowhere."""
    places, flag = PROGRAMS[name]
    path = shutil.which(name, path=env.get("PATH", os.defpath))
    program = path or in_places(name, places)
    if program is None:
        return None
    if flag is None:
        return Installed(name, program, package_version(Path(program), _PACKAGES[name]), path is not None)
    version = version_in(name, ask((program, flag), ASK_S).text)
    if name != "llama-server":
        return Installed(name, program, version, path is not None)
    gpu = lists_gpu(ask((program, "--list-devices"), ASK_S).text)
    usage = ask((program, "--help"), ASK_S)
    lacks = tuple(one for one in ALWAYS_PASSED if one not in usage.text) if usage.code == 0 else ()
    return Installed(name, program, version, path is not None, gpu, lacks)


def version_in(name: str, text: str) -> str | None:
    """Return the version in the output of a program; None if there is none. Ollama prints its client's last."""
    if name == "llama-server":
        found = _BUILD.search(text)
        return f"b{found[1]}" if found else None
    versions = _VERSION.findall(text)
    return versions[-1] if versions else None


def lists_gpu(text: str) -> bool:
    """Return whether the output of `llama-server --list-devices` names a device, such as `CUDA0: NVIDIA …`."""
    return any(re.match(r"\s+\w+\d*: .*MiB", line) for line in text.splitlines())


def package_version(program: Path, package: str) -> str | None:
    """Return the version of the Python package that a program was installed with, from the folder of its environment."""
    try:
        roots = {program.parent.parent, program.resolve().parent.parent}
        folders = [
            folder
            for root in roots
            for pattern in ("lib/python*/site-packages", "lib/python*/dist-packages")
            for folder in root.glob(pattern)
        ]
        names = [path.name for folder in folders for path in folder.glob(f"{package}-*.dist-info")]
    except OSError:
        return None
    return next((name.removesuffix(".dist-info").split("-", 1)[1] for name in names), None)


def embedded() -> Installed | None:
    """Return the wheel of llama.cpp that fleetd can use itself; None if it is not installed."""
    spec = importlib.util.find_spec(EMBEDDED)
    if spec is None or spec.origin is None:
        return None
    try:
        version: str | None = importlib.metadata.version(EMBEDDED)
    except importlib.metadata.PackageNotFoundError:
        version = None
    folder = Path(spec.origin).parent
    return Installed(EMBEDDED, str(folder), version, gpu=_has_gpu_library(folder))


def _has_gpu_library(folder: Path) -> bool:
    """Return whether a wheel brings or links a library of a GPU: the plain one from the package index does not."""
    names = [path.name.lower() for place in (folder, folder.with_name(f"{EMBEDDED}.libs")) for path in place.glob("*")]
    return any(word in name for name in names for word in ("cuda", "hip", "vulkan", "cublas", "metal"))
