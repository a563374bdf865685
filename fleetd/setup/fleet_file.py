"""Write the fleet.yaml of a proposal: its text with comments, checked by the code of `fleetd check`.

Invariants:
- What `check` rejects is left out with its reason, so the file that is written always passes.
- An existing file is replaced only if asked, and by rename: at no moment is there half a file.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from fleetd import __version__
from fleetd.config.importers.emit import to_yaml
from fleetd.errors import ConfigError, Problem
from fleetd.resolver.check import load_and_resolve
from fleetd.resolver.resolved import ResolvedFleet
from fleetd.setup.proposal import FleetProposal
from fleetd.units import show_size

ROUNDS = 4  # of leaving out what check rejects
LISTED_MAX = 100
EXAMPLE = """
# No model is served yet. For one GGUF file, remove the `#` of these lines and set the path:
#
# models:
#   mine:
#     engine: llamacpp
#     options: {model: /path/to/model.gguf, context_length: 4096}
#
# A running Ollama server, and one of the models that `ollama list` names:
#
# instances:
#   ollama: {engine: ollama, external: "http://127.0.0.1:11434"}
# models:
#   everyday: {instance: ollama, served_as: "llama3.2:3b"}
"""


def text_of(proposal: FleetProposal) -> str:
    """Return the text of the file."""
    comments = {
        "": [
            f"Written by fleetctl init {__version__}. Save a change, and the running fleet applies it.",
            "",
            "  fleetd check FILE      report every mistake",
            "  fleetctl explain NAME  why a model is in memory or not",
            "",
            "Completion in an editor: fleetd schema > fleet.schema.json",
        ],
        "gateway": [
            "The OpenAI API of all models. Loopback only; put a proxy with authentication in front to open it."
        ],
        "models": [
            "A model loads with its first request and unloads after ten idle minutes (ttl). When memory is short, fleetd",
            "unloads what is cheapest to load again. Useful keys: preload: true, ttl: 1h, aliases: [gpt-4o-mini].",
        ],
        **proposal.comments,
    }
    text = to_yaml(proposal.document, comments)
    if not proposal.models:
        text += EXAMPLE
    if proposal.left_out:
        text += "\n# Found, and left out:\n"
        listed = list(proposal.left_out.items())
        text += "".join(f"#   {_line(name)}: {_line(why)}\n" for name, why in listed[:LISTED_MAX])
        if len(listed) > LISTED_MAX:
            text += f"#   and {len(listed) - LISTED_MAX} more\n"
    return text


def _line(text: str) -> str:
    """Return a text on one line of a comment: names of files may hold any character."""
    return "".join(char if char.isprintable() else "?" for char in text)


def verified(proposal: FleetProposal, env: Mapping[str, str]) -> tuple[str, tuple[Problem, ...]]:
    """Return the text that passes the check, and its warnings. Changes the proposal. Raises ConfigError."""
    with tempfile.TemporaryDirectory(prefix="fleetctl-init-") as folder:
        path = Path(folder) / "fleet.yaml"
        for _ in range(ROUNDS):
            text = text_of(proposal)
            path.write_text(text, "utf-8")
            try:
                _, resolved = load_and_resolve(path, env)
            except ConfigError as error:
                if not _leave_out(proposal, error.problems):
                    raise
                continue
            if not _leave_out_what_does_not_fit(proposal, resolved):
                return text, resolved.warnings
        text = text_of(proposal)
        path.write_text(text, "utf-8")
        return text, load_and_resolve(path, env)[1].warnings


def _leave_out(proposal: FleetProposal, problems: Sequence[Problem]) -> bool:
    """Leave out the models that have a problem; False if a problem is of none of them."""
    bad = {name: problem for problem in problems if (name := _model_of(problem.path, list(proposal.models)))}
    for name, problem in bad.items():
        proposal.drop(name, problem.message)
    return bool(bad)


def _model_of(path: str, names: Sequence[str]) -> str | None:
    """Return the model that a path such as models.qwen2.5-7b.options belongs to; names may contain dots."""
    inside = [name for name in names if path == f"models.{name}" or path.startswith(f"models.{name}.")]
    return max(inside, key=len, default=None)


def _leave_out_what_does_not_fit(proposal: FleetProposal, resolved: ResolvedFleet) -> bool:
    """Leave out models whose footprint, as the daemon counts it, is larger than a budget; False if all fit."""
    budgets = {name: device.budget_bytes for name, device in resolved.spec.devices.items()}
    found = False
    for name, spec in resolved.spec.models.items():
        over = [device for device, size in spec.footprint.bytes.items() if size > budgets.get(device, size)]
        if over and name in proposal.models:
            sizes = f"{show_size(spec.footprint.bytes[over[0]])} of {show_size(budgets[over[0]])}"
            proposal.drop(name, f"does not fit: needs {over[0]} {sizes}")
            found = True
    return found


def write(path: Path, text: str, *, replace: bool) -> None:
    """Write the file. Raises FileExistsError unless `replace`, and OSError."""
    path = path.resolve() if replace else path  # a link to the file stays one
    path.parent.mkdir(parents=True, exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(fd, "w", encoding="utf-8") as file:
            file.write(text)
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o644 & ~mask)
        if replace:
            temporary.replace(path)
        else:
            _publish(temporary, path, text)
    finally:
        temporary.unlink(missing_ok=True)


def _publish(temporary: Path, path: Path, text: str) -> None:
    """Give a file its name unless that is taken. Raises FileExistsError and OSError."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as exFAT
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
