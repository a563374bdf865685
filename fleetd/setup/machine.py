"""What a machine has that a fleet can use: memory, programs, running servers, model files. Facts only.

Invariants:
- Nothing is started, changed or downloaded; every look is bounded in time, and one that does not answer is a note.
- A model file is listed once, whichever folders and links lead to it; files of Ollama's store are listed as its models.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from fleetd.errors import EngineError
from fleetd.host.system import ports
from fleetd.host.system.memory import Devices, DeviceSample
from fleetd.models import memory_estimate, scan
from fleetd.models.formats import gguf
from fleetd.models.ollama import inventory
from fleetd.setup import programs, servers
from fleetd.setup.bounded import together
from fleetd.setup.programs import Installed
from fleetd.setup.servers import Running

LOOK_S, SCAN_S = 15.0, 20.0
CONTEXTS = (8192, 4096, 2048)
GATEWAY_PORT = 8484


@dataclass(frozen=True, slots=True)
class Need:
    """The bytes of a model with this context: all of it on a GPU (`gpu`, and `rest` on the host), or all on the host."""

    context_length: int
    gpu: int
    rest: int
    host: int
    unified: int


@dataclass(frozen=True, slots=True)
class Candidate:
    """A model on disk, and what it needs, longest context first. `stored_as`: its name in Ollama's store."""

    found: scan.Found
    needs: tuple[Need, ...] = ()
    stored_as: str | None = None
    inode: tuple[int, int] | None = None

    @property
    def name(self) -> str:
        return self.found.key


@dataclass(frozen=True, slots=True)
class Machine:
    """The facts of a machine. `store`: the folder of Ollama's store; `gateway_port`: the first free one from 8484 on."""

    devices: tuple[DeviceSample, ...] = ()
    programs: tuple[Installed, ...] = ()
    servers: tuple[Running, ...] = ()
    files: tuple[Candidate, ...] = ()
    stored: tuple[Candidate, ...] = ()
    store: Path | None = None
    folders: tuple[Path, ...] = ()
    gateway_port: int = GATEWAY_PORT
    platform: str = sys.platform
    notes: tuple[str, ...] = ()

    def program(self, *names: str) -> Installed | None:
        """Return the first of these programs that is installed."""
        return next((one for name in names for one in self.programs if one.name == name), None)

    def server(self, engine: str) -> Running | None:
        return next((one for one in self.servers if one.engine == engine), None)


@dataclass(slots=True)
class _Models:
    """The models of several folders, collected by threads."""

    files: dict[Path, list[Candidate]] = field(default_factory=dict)
    stored: dict[Path, list[Candidate]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def look(given: Sequence[Path], env: Mapping[str, str], progress: Callable[[str], None] = lambda _: None) -> Machine:
    """Look at this machine, and at the folders given besides the usual ones. Blocks for at most about a minute."""
    progress("looking for engines, servers and memory …")
    seen = together(
        {
            "devices": lambda: tuple(Devices().sample()),
            "programs": lambda: programs.installed(env),
            "gateway": free_gateway_port,
            **{f"port {port}": partial(servers.look, port) for port in servers.PORTS},
        },
        LOOK_S,
    )
    notes = [f"{name}: no answer within {LOOK_S:g} s" for name in ("devices", "programs") if name not in seen]
    notes += [f"{name}: {result}" for name, result in seen.items() if isinstance(result, Exception)]
    folders = list(dict.fromkeys([*given, *store_folders(env), *usual_folders(env)]))
    progress("looking for models …")
    models = _look_for_models(folders)
    running = (_ok(seen.get(f"port {port}"), None) for port in servers.PORTS)
    stores = [folder for folder in folders if models.stored.get(folder)]
    notes += [f"{other}: another store of Ollama, left out (name it in OLLAMA_MODELS)" for other in stores[1:]]
    return Machine(
        devices=_ok(seen.get("devices"), ()),
        programs=_ok(seen.get("programs"), ()),
        servers=tuple(one for one in running if one is not None),
        files=tuple(_unique(models.files.get(folder, []) for folder in folders)),
        stored=tuple(models.stored[stores[0]]) if stores else (),
        store=stores[0] if stores else None,
        folders=tuple(folder for folder in folders if folder in models.files or folder in models.stored),
        gateway_port=_ok(seen.get("gateway"), GATEWAY_PORT),
        notes=(*notes, *models.notes),
    )


def usual_folders(env: Mapping[str, str]) -> list[Path]:
    """Return the folders where LM Studio, llama.cpp and Hugging Face keep models, whether they exist or not."""
    home = Path(env.get("HOME") or Path.home())
    cache = Path(env.get("XDG_CACHE_HOME") or home / ".cache")
    hugging_face = env.get("HF_HUB_CACHE") or str(Path(env.get("HF_HOME") or cache / "huggingface") / "hub")
    places = [
        home / ".lmstudio/models",
        home / ".cache/lm-studio/models",
        Path(env.get("LLAMA_CACHE") or cache / "llama.cpp"),
    ]
    places += [home / "Library/Caches/llama.cpp", Path(hugging_face)]
    return list(dict.fromkeys(places))


def store_folders(env: Mapping[str, str]) -> list[Path]:
    """Return the folders where Ollama keeps its store, whether they exist or not."""
    home = Path(env.get("HOME") or Path.home())
    own = [Path(env["OLLAMA_MODELS"])] if env.get("OLLAMA_MODELS") else []
    return [*own, home / ".ollama/models", Path("/usr/share/ollama/.ollama/models"), Path("/var/lib/ollama/models")]


def free_gateway_port() -> int:
    """Return the first port from 8484 on that can be bound."""
    near = range(GATEWAY_PORT, GATEWAY_PORT + 100)
    return next((port for port in near if ports.is_free("127.0.0.1", port)), GATEWAY_PORT)


def _ok(result: Any, default: Any) -> Any:
    return default if result is None or isinstance(result, Exception) else result


def _look_for_models(folders: Sequence[Path]) -> _Models:
    models = _Models()
    until = time.monotonic() + SCAN_S
    looks = {str(folder): partial(_look_into, folder, until, models) for folder in folders}
    done = together(looks, SCAN_S + 5.0)
    models.notes += [f"{name}: does not answer, left out" for name in looks if name not in done]
    models.notes += [f"{name}: {result}" for name, result in done.items() if isinstance(result, Exception)]
    return models


def _look_into(folder: Path, until: float, models: _Models) -> None:
    if inventory.is_store(folder):
        _read_store(folder, until, models)
    elif folder.is_dir():
        _scan(folder, until, models)


def _scan(folder: Path, until: float, models: _Models) -> None:
    result = scan.scan(folder, max(0.1, (until - time.monotonic()) / 2))
    models.notes += result.notes
    found = models.files.setdefault(folder, [])
    for model in result.models:
        if time.monotonic() > until:
            models.notes.append(f"{folder}: {len(result.models) - len(found)} models left out after {SCAN_S:g} s")
            break
        try:
            status = model.path.stat()
            found.append(Candidate(model, needs_of(model), inode=(status.st_dev, status.st_ino)))
        except (EngineError, OSError) as error:
            models.notes.append(str(error))


def _read_store(folder: Path, until: float, models: _Models) -> None:
    result = inventory.read(folder, max(0.1, (until - time.monotonic()) / 2))
    models.notes += result.notes
    found = models.stored.setdefault(folder, [])
    for model in result.models:
        if model.weights is None:
            continue
        file = scan.Found(
            model.name,
            "gguf",
            model.weights,
            model.size_bytes,
            model.architecture,
            model.context_length,
            model.embedding,
        )
        try:
            needs = needs_of(file) if time.monotonic() < until else ()
            found.append(Candidate(file, needs, model.name))
        except EngineError:
            found.append(Candidate(file, (), model.name))


def needs_of(model: scan.Found) -> tuple[Need, ...]:
    """Return what a model needs with each of the usual contexts up to the one it was trained for. Raises EngineError."""
    if model.kind != "gguf":
        size = int(model.size_bytes * 1.25) + (1 << 30)
        return (Need(model.context_length or CONTEXTS[-1], size, 1 << 30, size, size),)
    headers = gguf.read_all([Path(part) for part in gguf.shards(model.path)])
    extra = gguf.read(model.projector).weight_bytes + memory_estimate.MMPROJ_HEADROOM_BYTES if model.projector else 0
    limit = model.context_length or CONTEXTS[-1]
    contexts = [context for context in CONTEXTS if context <= limit] or [max(1, limit)]
    return tuple(_need(headers, context, extra) for context in contexts)


def _need(headers: Sequence[gguf.Header], context: int, extra: int) -> Need:
    def sizes(layers: int | None, *, unified: bool = False) -> memory_estimate.GgufSizes:
        serving = memory_estimate.GgufServing(context_length=context, gpu_layers=layers, unified=unified)
        return memory_estimate.estimate(headers, serving, extra)

    gpu = sizes(None)
    return Need(context, gpu.device_bytes, gpu.host_bytes, sizes(0).total_bytes, sizes(None, unified=True).total_bytes)


def _unique(groups: Iterator[list[Candidate]]) -> Iterator[Candidate]:
    """Yield each file once: the same one may be below two of the folders."""
    seen: set[tuple[int, int] | None] = set()
    for candidate in (one for group in groups for one in group):
        if candidate.inode is None or candidate.inode not in seen:
            seen.add(candidate.inode)
            yield candidate
