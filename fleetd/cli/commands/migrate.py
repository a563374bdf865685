"""`fleetctl migrate ollama-to-vllm`: propose a fleet in which both engines serve one name.

Invariants:
- Reads a store folder and, when given, a fleet.yaml; writes only to standard output. No daemon is needed.
- Every model without a known source is reported; nothing is guessed.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click

from fleetd.cli.client import EXIT_OK, EXIT_USAGE, CliError
from fleetd.cli.context import Session, forms, say
from fleetd.cli.render import clean
from fleetd.units import expand_home


@click.group(name="migrate")
def migrate() -> None:
    """Generate a migration proposal."""


@migrate.command(name="ollama-to-vllm")
@click.argument("folder", required=False, metavar="[STORE]", type=click.Path())
@click.option("--config", metavar="FILE", type=click.Path(), help="A fleet.yaml whose names to keep.")
@click.option(
    "--instance", default="ollama", show_default=True, metavar="NAME", help="Name of the fleet's Ollama server."
)
@click.option("--device", metavar="NAME", help="Device for vLLM, such as gpu0.")
@click.option(
    "--weight",
    type=click.IntRange(0, 100),
    default=10,
    show_default=True,
    help="Percentage of requests for vLLM.",
)
@forms("yaml", "json")
def ollama_to_vllm(
    session: Session, folder: str | None, config: str | None, instance: str, device: str | None, weight: int
) -> int:
    """Propose vLLM entries for an Ollama store.

    A model whose header names the safetensors that it was created from becomes a route over both engines, each the
    fallback of the other: raise the weight of vLLM step by step. A model without a known source stays with Ollama and
    is reported.

    STORE is the folder with manifests and blobs; default: $OLLAMA_MODELS, else ~/.ollama/models.
    """
    from fleetd.errors import FleetError
    from fleetd.models.ollama import inventory, migration

    where = Path(expand_home(folder or os.environ.get("OLLAMA_MODELS") or "~/.ollama/models")).absolute()
    try:
        found = inventory.read(where)
        names = _names(Path(expand_home(config))) if config is not None else {}
    except FleetError as error:
        raise CliError(str(error), EXIT_USAGE, error.hint) from None
    proposal = migration.propose(found.models, names, instance=instance, vllm_weight=weight, device=device)
    if session.form == "json":
        document: dict[str, Any] = {
            "schema": "fleetctl/v1",
            "store": str(where),
            "models": proposal.models,
            "found": proposal.found,
            "unknown": proposal.unknown,
            "notes": list(found.notes),
        }
        session.screen.json(document)
    else:
        click.echo(_text(where, proposal, instance), nl=False)
    for name, why in proposal.unknown.items():
        say(clean(f"{name}: stays with Ollama: {why}"))
    for note in found.notes:
        say(clean(note))
    say(f"{len(proposal.found)} of {len(proposal.found) + len(proposal.unknown)} models have a known source for vLLM")
    return EXIT_OK


def _text(where: Path, proposal: Any, instance: str) -> str:
    from fleetd.config.importers.emit import to_yaml

    if not proposal.models:
        return f"# {where} holds no models\n"
    comments = {"": [f"proposed from {where}; the server {instance} is the fleet's own Ollama"]}
    for name, why in proposal.found.items():
        comments[f"models.{name}"] = [f"{name}: both engines; source {why}"]
    for name, why in proposal.unknown.items():
        comments[f"models.{name}"] = [f"{name}: Ollama alone; {why}"]
    return to_yaml({"models": proposal.models}, comments)


def _names(config: Path) -> dict[str, str]:
    """Return the fleet's model name by served name. Raises ConfigError."""
    from fleetd.config.load import load
    from fleetd.config.schema.model import HeldModel

    loaded = load(config, os.environ)
    held = {name: model for name, model in loaded.config.models.items() if isinstance(model, HeldModel)}
    return {model.served_as or name: name for name, model in held.items()}


VERBS: tuple[click.Command, ...] = (migrate,)
