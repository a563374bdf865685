"""Decide which entries a fleet.yaml for this machine has. Pure: facts go in, the document and its comments come out.

Invariants:
- Every model fits into the budget of its device by itself; one that does not is left out, with its numbers.
- A server that runs already is used as it is (`external`); nothing of the proposal starts a second one on its port.
- Names are unique, valid in fleet.yaml, and those of their servers or files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fleetd.config.names import RESERVED_NAMES, free_name
from fleetd.config.schema.base import MODEL_NAME, PROCESS_NAME
from fleetd.host.system.memory import DeviceSample
from fleetd.resolver.devices import SHARES
from fleetd.setup.machine import GATEWAY_PORT, Candidate, Machine, Need
from fleetd.setup.servers import Running
from fleetd.units import show_size

MAX_MODELS = 1000
RESERVED = RESERVED_NAMES | {"ollama", "lmstudio", "server"}
INSTALL_LLAMA = (
    "llama.cpp is not installed: pipx inject fleetd 'fleetd[llamacpp]' (or pip install), or put llama-server on PATH"
)
GUARD_BYTES = 256 << 20  # what a server takes besides the file of an unknown model
VLLM_SHARE = 0.85  # of the card; vLLM's own default, 0.92, is above the budget of a GPU
# Architectures that vLLM serves as a chat or completion model
_GENERATES = re.compile(r"(?!T5|MT5|Bart|Whisper|Pegasus).*For(CausalLM|ConditionalGeneration)")


@dataclass(slots=True)
class FleetProposal:
    """The document of a fleet.yaml, comments by entry, what was left out (name → why), and advice for the person."""

    document: dict[str, Any] = field(default_factory=dict)
    comments: dict[str, list[str]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    advice: list[str] = field(default_factory=list)

    @property
    def models(self) -> dict[str, Any]:
        found: dict[str, Any] = self.document.get("models", {})
        return found

    def leave_out(self, name: str, why: str) -> None:
        """Remember why a model is not in the file; two of one name, in two folders, are two lines."""
        self.left_out[unique(name, self.left_out)] = why

    def drop(self, name: str, why: str) -> None:
        """Leave out a model that turned out not to work."""
        self.models.pop(name, None)
        self.comments.pop(f"models.{name}", None)
        self.leave_out(name, why)
        if not self.models:
            self.document.pop("models", None)

    def first_model(self) -> str | None:
        """Return the model to try first: the smallest that answers in words."""
        words = [name for name, entry in self.models.items() if not is_embedding(entry)]
        return next(iter(words), None)


def is_embedding(entry: Mapping[str, Any]) -> bool:
    options = entry.get("options", {})
    return bool(entry.get("embedding") or options.get("embeddings") or options.get("rerank"))


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a model goes: its device (None: the default one), with which context, and the bytes."""

    device: str | None
    need: Need
    size: int


class _Budgets:
    """The budgets that fleetd takes when the file states none, and the device that entries have by default."""

    def __init__(self, devices: Sequence[DeviceSample]) -> None:
        self.of = {one.name: int((one.limit_bytes or one.total_bytes) * SHARES[one.kind]) for one in devices}
        self.gpus = [one.name for one in devices if one.kind == "gpu"]
        self.default = "unified" if "unified" in self.of else self.gpus[0] if self.gpus else "host"
        self.placed = dict.fromkeys(self.gpus, 0)

    def place(self, needs: Sequence[Need], *, gpu: bool = True) -> _Place | None:
        """Return where a model fits: on the GPU with the fewest bytes so far, else on the host; None: nowhere."""
        if "unified" in self.of:
            return self._first(needs, "unified", None)
        host = self.of.get("host", 0)
        for need in needs if gpu else ():
            fitting = [name for name in self.gpus if need.gpu <= self.of[name] and need.rest <= host]
            if fitting:
                name = min(fitting, key=lambda one: self.placed[one])
                self.placed[name] += need.gpu
                return _Place(None if name == self.default else name, need, need.gpu)
        return self._first(needs, "host", "host" if self.gpus else None)

    def _first(self, needs: Sequence[Need], name: str, device: str | None) -> _Place | None:
        for need in needs:
            size = need.unified if name == "unified" else need.host
            if size <= self.of.get(name, 0):
                return _Place(device, need, size)
        return None

    def too_large(self, needs: Sequence[Need]) -> str:
        """Return the numbers of a model that fits nowhere."""
        least = min(needs, key=lambda need: need.host)
        sizes = {"unified": least.unified, "host": least.host} | dict.fromkeys(self.gpus, least.gpu)
        parts = [f"{name} {show_size(sizes[name])} of {show_size(budget)}" for name, budget in self.of.items()]
        return f"does not fit: needs {', '.join(parts)} at {least.context_length} tokens"


def propose(machine: Machine) -> FleetProposal:
    """Return the fleet.yaml for a machine."""
    result = FleetProposal()
    result.document = {"version": 1, "gateway": {"listen": f"127.0.0.1:{machine.gateway_port}"}}
    _devices(machine, result)
    budgets = _Budgets(machine.devices)
    instances: dict[str, Any] = {}
    models: dict[str, Any] = {}
    result.document |= {"instances": instances, "models": models}
    for server in machine.servers:
        _running(server, budgets, instances, models, result)
    _stored(machine, budgets, instances, result)
    _files(machine, budgets, instances, result)
    for section in ("instances", "models"):
        if not result.document[section]:
            del result.document[section]
    _advice(machine, result)
    return result


# -- devices ---------------------------------------------------------------------------------------------------------------


def _devices(machine: Machine, result: FleetProposal) -> None:
    if not machine.devices:
        return
    result.document["devices"] = {one.name: {"budget": f"{round(SHARES[one.kind] * 100)}%"} for one in machine.devices}
    lines = ["The memory that loaded models may take together; the rest is for everything else on this machine."]
    for one in machine.devices:
        limit = f", of which a GPU may use {show_size(one.limit_bytes)}" if one.limit_bytes else ""
        lines.append(f"{one.name}: {show_size(one.total_bytes)}{limit}, {show_size(one.used_bytes)} in use now")
    result.comments["devices"] = lines


# -- servers that run --------------------------------------------------------------------------------------------------------


def _running(
    server: Running, budgets: _Budgets, instances: dict[str, Any], models: dict[str, Any], result: FleetProposal
) -> None:
    """Add a server that runs, as it is, with the models that it lists."""
    engine = server.engine
    name = {"ollama": "ollama", "lmstudio": "lmstudio"}.get(engine, f"server-{server.port}")
    entry: dict[str, Any] = {"engine": engine, "external": f"http://127.0.0.1:{server.port}"}
    who = {"ollama": "Ollama", "lmstudio": "LM Studio"}.get(engine, server.owner or "A server")
    version = f" {server.version}" if server.version else ""
    lines = [f"{who}{version} runs on port {server.port}. fleetd uses it as it is, and does not start or stop it."]
    if engine == "ollama":
        lines.append("To let fleetd run it: stop Ollama's own service, and replace `external` by `port: 11434`.")
    if server.locked:
        result.advice.append(
            f"a server on port {server.port} asks for a key: add it as an instance with external: "
            f"http://127.0.0.1:{server.port} and options: {{api_key: ${{NAME}}}}"
        )
        return
    instances[name] = entry
    result.comments[f"instances.{name}"] = lines
    for listed in server.models:
        need = _guessed(listed.size_bytes or 0)
        if budgets.place((need,)) is None:
            result.leave_out(listed.name, budgets.too_large((need,)))
            continue
        key = unique(listed.name, models)
        held: dict[str, Any] = {"instance": name}
        held |= {"served_as": listed.name} if key != listed.name else {}
        models[key] = held | ({"embedding": True} if listed.embedding else {})
        if listed.size_bytes:
            result.comments[f"models.{key}"] = [f"{show_size(listed.size_bytes)} on disk"]


def _stored(machine: Machine, budgets: _Budgets, instances: dict[str, Any], result: FleetProposal) -> None:
    """Add the models of Ollama's store: on a server that fleetd runs, unless one runs already."""
    if machine.server("ollama") is not None or machine.store is None or not machine.stored:
        return
    if machine.program("ollama") is None:
        _stored_without_ollama(machine, budgets, result)
        return
    instances["ollama"] = _own_ollama(machine)
    result.comments["instances.ollama"] = [
        "Ollama, run by fleetd: it starts with the daemon, on demand it loads the models below."
    ]
    for candidate in machine.stored:
        name = str(candidate.stored_as)
        place = budgets.place(candidate.needs or (_guess(candidate),))
        if place is None:
            result.leave_out(name, budgets.too_large(candidate.needs or (_guess(candidate),)))
            continue
        key = unique(name, result.models)
        held: dict[str, Any] = {"instance": "ollama"} | ({"served_as": name} if key != name else {})
        result.models[key] = held | ({"embedding": True} if candidate.found.embedding else {})
        result.comments[f"models.{key}"] = [_size_line(candidate, place)]


def _own_ollama(machine: Machine) -> dict[str, Any]:
    entry: dict[str, Any] = {"engine": "ollama", "port": 11434}
    home_store = machine.store is not None and machine.store.parts[-2:] == (".ollama", "models")
    if machine.store is not None and not (home_store and "usr" not in machine.store.parts):
        entry["options"] = {"models_dir": str(machine.store)}
    return entry


def _stored_without_ollama(machine: Machine, budgets: _Budgets, result: FleetProposal) -> None:
    """Serve the files of Ollama's store by llama.cpp, where Ollama itself is not installed."""
    if machine.program("llama-server", "xllamacpp") is None:
        result.advice.append(
            f"{machine.store} has {len(machine.stored)} models of Ollama, which is not installed: https://ollama.com/download"
        )
        return
    for candidate in machine.stored:
        _gguf(candidate, machine, budgets, result, "from Ollama's store")


def _guess(candidate: Candidate) -> Need:
    return _guessed(candidate.found.size_bytes)


def _guessed(size_bytes: int) -> Need:
    """Return what a file of this size needs, where its header cannot be read."""
    size = int(size_bytes * 1.15) + GUARD_BYTES
    return Need(4096, size, GUARD_BYTES, size, size)


# -- files -------------------------------------------------------------------------------------------------------------------


def _files(machine: Machine, budgets: _Budgets, instances: dict[str, Any], result: FleetProposal) -> None:
    listed = sorted(
        machine.files, key=lambda one: (one.found.embedding or one.found.rerank, one.found.size_bytes, one.name)
    )
    ggufs = [one for one in listed if one.found.kind == "gguf"]
    for candidate in ggufs[MAX_MODELS:]:
        result.leave_out(candidate.name, f"more than {MAX_MODELS} models: {candidate.found.path}")
    if machine.program("llama-server", "xllamacpp") is not None:
        for candidate in ggufs[:MAX_MODELS]:
            _gguf(candidate, machine, budgets, result)
    elif ggufs and machine.program("ollama") is not None:
        _built_by_ollama(machine, ggufs[:MAX_MODELS], budgets, instances, result)
    elif ggufs:
        result.advice.append(f"{len(ggufs)} GGUF files were found, and no program that serves them")
        for candidate in ggufs[:MAX_MODELS]:
            result.leave_out(candidate.name, f"no program serves it: {candidate.found.path}")
    for candidate in listed:
        if candidate.found.kind == "safetensors":
            _safetensors(candidate, machine, budgets, result)


def _gguf(candidate: Candidate, machine: Machine, budgets: _Budgets, result: FleetProposal, origin: str = "") -> None:
    program = machine.program("llama-server", "xllamacpp")
    gpu = program is not None and program.gpu
    place = budgets.place(candidate.needs, gpu=gpu)
    if place is None:
        result.leave_out(candidate.name, f"{budgets.too_large(candidate.needs)}: {candidate.found.path}")
        return
    key = unique(candidate.name, result.models, process=True)
    entry = candidate.found.entry()
    entry = {"engine": entry["engine"]} | ({"device": place.device} if place.device else {}) | entry
    entry["options"] = dict(entry["options"]) | {"context_length": place.need.context_length}
    if candidate.stored_as is not None and candidate.stored_as != key:
        entry["aliases"] = [candidate.stored_as]
    result.models[key] = entry
    lines = [_size_line(candidate, place)]
    if origin:
        lines.append(f"{origin}; `ollama rm` deletes it")
    if place.device == "host" and not gpu:
        lines.append("on the CPU: this build of llama.cpp has no GPU support")
    if candidate.found.projector is not None:
        lines.append("with its projector: it accepts images or audio")
    result.comments[f"models.{key}"] = lines


def _built_by_ollama(
    machine: Machine, ggufs: Sequence[Candidate], budgets: _Budgets, instances: dict[str, Any], result: FleetProposal
) -> None:
    """Let Ollama serve GGUF files: it makes its own copy of each at the first load."""
    if "ollama" not in instances:
        instances["ollama"] = _own_ollama(machine)
        result.comments["instances.ollama"] = [
            "Ollama, run by fleetd. It copies a file into its own store at the first load."
        ]
    for candidate in ggufs:
        place = budgets.place(candidate.needs)
        if candidate.found.shards > 1:
            result.leave_out(candidate.name, f"Ollama does not take a model in several files: {candidate.found.path}")
        elif place is None:
            result.leave_out(candidate.name, f"{budgets.too_large(candidate.needs)}: {candidate.found.path}")
        else:
            key = unique(candidate.name, result.models)
            result.models[key] = candidate.found.entry("ollama")
            result.comments[f"models.{key}"] = [_size_line(candidate, place)]


def _safetensors(candidate: Candidate, machine: Machine, budgets: _Budgets, result: FleetProposal) -> None:
    """Serve a folder of safetensors by vLLM on a GPU, or by MLX on a Mac."""
    found = candidate.found
    mlx = machine.program("mlx_lm.server") if machine.platform == "darwin" else None
    vllm = machine.program("vllm") if budgets.gpus else None
    if not _GENERATES.fullmatch(found.architecture):
        why = f"not a text model ({found.architecture or 'unknown architecture'}): {found.path}"
        result.leave_out(candidate.name, why)
        return
    if vllm is None and mlx is None:
        needs = "MLX (pip install mlx-lm)" if machine.platform == "darwin" else "vLLM and a GPU"
        result.leave_out(candidate.name, f"needs {needs}: {found.path}")
        return
    place = budgets.place(candidate.needs)
    share = VLLM_SHARE / SHARES["gpu"]
    if place is None or (
        vllm is not None
        and (place.device == "host" or place.size > share * budgets.of[place.device or budgets.default])
    ):
        result.leave_out(candidate.name, f"{budgets.too_large(candidate.needs)}: {found.path}")
        return
    key = unique(candidate.name, result.models, process=True)
    more: list[str] = []
    entry: dict[str, Any] = {"engine": "vllm"} | ({"device": place.device} if place.device else {})
    if vllm is not None:
        length = min(found.context_length or 8192, 8192)
        options = {"model": str(found.path), "max_model_len": length, "gpu_memory_utilization": VLLM_SHARE}
        entry["options"] = options
        more = [f"vLLM takes {VLLM_SHARE:.0%} of the card for itself: lower it, and two models share a card"]
    else:
        command = ["mlx_lm.server", "--model", str(found.path), "--host", "127.0.0.1", "--port", "{port}"]
        entry = {
            "engine": "process",
            "command": command,
            "served_as": str(found.path),
            "memory": {"unified": place.size},
            "options": {"health": "/health"},
        }
    result.models[key] = entry
    result.comments[f"models.{key}"] = [_size_line(candidate, place), *more]


def _size_line(candidate: Candidate, place: _Place) -> str:
    found = candidate.found
    what = "embeddings" if found.embedding else "reranking" if found.rerank else ""
    parts = [
        found.architecture,
        what,
        f"{show_size(found.size_bytes)} on disk",
        f"about {show_size(place.size)} loaded",
    ]
    return ", ".join(part for part in parts if part)


# -- names and advice --------------------------------------------------------------------------------------------------------


def unique(wanted: str, taken: Mapping[str, Any], *, process: bool = False) -> str:
    """Return a name for fleet.yaml that is valid and free, as near as possible to the wanted one.

    `process`: the model is a process of its own, whose name allows fewer characters.
    """
    pattern, others, longest = (
        (PROCESS_NAME, r"[^A-Za-z0-9._-]+", 58) if process else (MODEL_NAME, r"[^A-Za-z0-9._:/@+-]+", 190)
    )
    base = wanted if re.fullmatch(pattern, wanted) else re.sub(others, "-", wanted)
    base = base.lstrip("._:/@+-")[:longest].rstrip("-") or "model"
    return free_name(base, taken, RESERVED, longest=200)


def _advice(machine: Machine, result: FleetProposal) -> None:
    """Add what a person may do next, where something is missing."""
    if (
        machine.program("llama-server", "xllamacpp", "ollama", "vllm", "lms", "mlx_lm.server") is None
        and not machine.servers
    ):
        result.advice.insert(0, "no engine is installed. " + INSTALL_LLAMA)
    elif machine.files and machine.program("llama-server", "xllamacpp", "ollama") is None:
        result.advice.append(INSTALL_LLAMA)
    lms = machine.program("lms")
    if lms is not None and machine.server("lmstudio") is None and not result.models:
        result.advice.append(
            "LM Studio is installed and its server does not run: lms server start, then fleetctl init again"
        )
    if machine.gateway_port != GATEWAY_PORT:
        result.advice.append(f"port {GATEWAY_PORT} is taken: the gateway gets {machine.gateway_port}")
    result.advice += list(_about_models(machine, result))


def _about_models(machine: Machine, result: FleetProposal) -> Iterator[str]:
    if result.models:
        return
    if machine.files or machine.stored or any(server.models for server in machine.servers):
        yield "models were found, and none can be served here: the file lists the reasons"
        return
    yield "no model was found: name the folder of your GGUF files, fleetctl init DIR"
