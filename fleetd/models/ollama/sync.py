"""Synchronise one Ollama store with fleet.yaml: compare, create or update in place, delete what is no longer configured.

Invariants:
- Nothing is created when nothing changed: a model's hash covers its request and the fingerprints of its files.
- In place: a symbolic link in MODELS_DIR/blobs points to the original file. The link's digest is derived from the model's name and
  the file's fingerprint, not from its bytes: Ollama does not check it, no file is read completely, and two models over one file
  get a runner each (Ollama shares one runner per blob, and lists only one of the names).
- A store whose folder the server does not share with fleetd (a container, another machine) gets the bytes by upload.
- Only what fleetd created is replaced or deleted. A model of the same name that someone else created is used unchanged.
- The record of created models is in the state folder; without it, they count as foreign.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fleetd.errors import EngineError
from fleetd.models.formats import fingerprint
from fleetd.models.ollama import register, store
from fleetd.models.ollama.api import OllamaApi, Progress, ignore_progress
from fleetd.models.ollama.modelfile import ModelRecipe, invisible

if TYPE_CHECKING:
    from aiohttp import ClientSession

CREATE_TIMEOUT_S = 3600.0
RECORD_NAME = "models.json"
_RECORD = threading.Lock()  # one file for all stores, which work in different threads
COPIES_SINCE = (0, 30, 0)  # since then, /api/create rewrites every GGUF; before, it used the blob unchanged


class StoreChange(StrEnum):
    NONE = "none"
    CREATE = "create"
    UPDATE = "update"
    DELETE = "delete"
    FOREIGN = "foreign"  # the store has a model of this name that fleetd did not create: used unchanged
    MISSING = "missing"  # the file is missing; or fleet.yaml names none, and the store has no such model


@dataclass(frozen=True, slots=True)
class Step:
    """One difference between fleet.yaml and a store. `recipe` is None for a deletion."""

    name: str
    served_as: str
    change: StoreChange
    reason: str
    recipe: ModelRecipe | None = None
    content_hash: str = ""


def copied(state_dir: Path, store_key: str, served_as: str) -> bool:
    """Return whether a store has a model's own bytes, not a link. Blocks."""
    entry = _recorded(state_dir / RECORD_NAME, store_key).get(store.ModelName.parse(served_as).key)
    return entry is not None and not entry.get("link")


def _recorded(path: Path, store_key: str) -> dict[str, dict[str, Any]]:
    """Return the recorded models of a store by full name. Blocks."""
    stores = fingerprint.read_record(path).get("stores")
    made = stores.get(store_key) if isinstance(stores, dict) else None
    return {key: entry for key, entry in made.items() if isinstance(entry, dict)} if isinstance(made, dict) else {}


class Library:
    """One store: its server, its folder, and the record of what fleetd created there.

    `models_dir` None: the store's folder is not writable for fleetd, so files are uploaded. Blocking file work runs in threads.
    Calls for one store must not overlap.
    """

    def __init__(
        self,
        http: ClientSession,
        base_url: str,
        state_dir: Path,
        models_dir: Path | None = None,
        api_key: str | None = None,
    ) -> None:
        self.api = OllamaApi(http, base_url, api_key)
        self.models_dir = models_dir
        self.record_path = state_dir / RECORD_NAME
        self.key = str(models_dir.resolve()) if models_dir is not None else self.api.base_url

    # -- comparing ---------------------------------------------------------------------------------------------------

    async def plan(self, recipes: Sequence[ModelRecipe]) -> list[Step]:
        """Return one step per recipe, and a deletion per created model without recipe."""
        present = {store.ModelName.parse(_tag_name(tag)).key for tag in await self.api.tags()}
        created = await asyncio.to_thread(self.created)
        steps = [await self._step(recipe, present, created) for recipe in recipes]
        wanted = {store.ModelName.parse(recipe.served_as).key for recipe in recipes}
        for key, entry in sorted(created.items()):
            if key not in wanted:
                served_as = str(entry.get("served_as", key))
                reason = "created by fleetd, and no longer in fleet.yaml"
                steps.append(Step(str(entry.get("name", key)), served_as, StoreChange.DELETE, reason))
        return steps

    async def _step(self, recipe: ModelRecipe, present: set[str], created: Mapping[str, Mapping[str, Any]]) -> Step:
        def step(change: StoreChange, reason: str, content_hash: str = "") -> Step:
            return Step(recipe.name, recipe.served_as, change, reason, recipe, content_hash)

        key = store.ModelName.parse(recipe.served_as).key
        if recipe.source is None and recipe.base is None:
            if key in present:
                return step(StoreChange.NONE, "in the store, as fleet.yaml expects")
            reason = (
                f"{recipe.served_as} is not in the store, and models.{recipe.name}.from names no file to create it from"
            )
            return step(StoreChange.MISSING, reason)
        if key in present and key not in created and not await asyncio.to_thread(self._lost_its_record, recipe):
            lacks = f", without {', '.join(sorted(recipe.parameters))} of fleet.yaml" if recipe.parameters else ""
            return step(StoreChange.FOREIGN, f"in the store, not created by fleetd: used unchanged{lacks}")
        try:
            content_hash = recipe.content_hash(await asyncio.to_thread(_fingerprints, recipe))
        except EngineError as error:
            if key in present and key in created and not created[key].get("link"):
                return step(StoreChange.NONE, "complete in the store; its source file is missing")
            return step(StoreChange.MISSING, str(error))
        if key not in present:
            return step(StoreChange.CREATE, "not in the store", content_hash)
        if key not in created:
            return step(StoreChange.UPDATE, "created by fleetd, but its record is lost", content_hash)
        if created[key].get("hash") != content_hash:
            return step(StoreChange.UPDATE, "its file or its modelfile changed", content_hash)
        link = created[key].get("link")
        if (
            self.models_dir is not None
            and link
            and not await asyncio.to_thread((self.models_dir / "blobs" / link).exists)
        ):
            return step(StoreChange.UPDATE, "its link leads nowhere", content_hash)
        return step(StoreChange.NONE, "unchanged", content_hash)

    # -- changing -------------------------------------------------------------------------------------------------------

    async def apply(
        self, step: Step, progress: Progress = ignore_progress, timeout_s: float = CREATE_TIMEOUT_S
    ) -> None:
        """Carry out one step. Raises EngineError, which is recoverable for a missing file."""
        if step.change is StoreChange.DELETE:
            await self.delete(step.served_as)
        elif step.change is StoreChange.MISSING:
            has_source = step.recipe is not None and step.recipe.source is not None
            raise EngineError(step.reason, recoverable=has_source, hint="is the drive mounted?" if has_source else None)
        elif step.change in (StoreChange.CREATE, StoreChange.UPDATE) and step.recipe is not None:
            await self._create(step.recipe, step.content_hash, progress, timeout_s)

    async def ensure(
        self, recipe: ModelRecipe, progress: Progress = ignore_progress, timeout_s: float = CREATE_TIMEOUT_S
    ) -> Step:
        """Create or update a model if it changed; return the step. Raises EngineError."""
        step = next(step for step in await self.plan([recipe]) if step.recipe is recipe)
        await self.apply(step, progress, timeout_s)
        return step

    async def delete(self, served_as: str) -> None:
        """Delete a created model and its link, not the linked file. Raises EngineError."""
        key = store.ModelName.parse(served_as).key
        entry = (await asyncio.to_thread(self.created)).get(key)
        if entry is None:
            raise EngineError(
                f"{served_as} was not created by fleetd; delete it with `ollama rm {served_as}`", recoverable=False
            )
        await self.api.delete(served_as)
        await asyncio.to_thread(self._forget, key, entry.get("link"))

    async def _create(self, recipe: ModelRecipe, content_hash: str, progress: Progress, timeout_s: float) -> None:
        files = await asyncio.to_thread(_files, recipe)
        digests: dict[Path, str] = {}
        links: list[str] = []
        try:
            for path in files:
                digest = await self._shared(recipe, path, links)
                digests[path] = digest or await self._upload(path, progress, timeout_s)
            if not await self._registered(recipe, digests, links):
                await self.api.create(recipe.request(digests, files), progress, timeout_s)
        except BaseException:
            await asyncio.to_thread(self._drop_links, links)
            raise
        kept = await asyncio.to_thread(self._keep, recipe, content_hash, links)
        progress("in place" if kept else "made", 1, 1)

    async def _shared(self, recipe: ModelRecipe, path: Path, links: list[str]) -> str | None:
        """Link a file into the store, append to `links`; None if not seen by the server."""
        digest = await asyncio.to_thread(self._link, recipe, path) if self.models_dir is not None else None
        if digest is None:
            return None
        link = digest.replace(":", "-")
        if not await self.api.has_blob(digest):  # not this server's folder: a container, another machine
            await asyncio.to_thread(self._drop_links, [link])
            return None
        links.append(link)
        return digest

    async def _registered(self, recipe: ModelRecipe, digests: Mapping[Path, str], links: Sequence[str]) -> bool:
        """Register the model by its manifest if that avoids a copy; else return False."""
        whole = recipe.quantize is None and len(digests) == len(links) == 1 and recipe.source in digests
        if self.models_dir is None or not whole or await self.api.version() < COPIES_SINCE:
            return False
        try:
            await asyncio.to_thread(register.register, self.models_dir, recipe, next(iter(digests.values())))
        except EngineError:
            return False  # the server may still be able to read a header that fleetd cannot
        return True

    async def _upload(self, path: Path, progress: Progress, timeout_s: float) -> str:
        digest = "sha256:" + await asyncio.to_thread(self._sha256, path, progress)
        if not await self.api.has_blob(digest):
            await self.api.upload(path, digest, progress, timeout_s)
        return digest

    # -- files; all of these block --------------------------------------------------------------------------------------

    def created(self) -> dict[str, dict[str, Any]]:
        """Return the record: full name → {name, served_as, hash, link, made}. Blocks."""
        return _recorded(self.record_path, self.key)

    def stored(self, served_as: str) -> dict[str, Any]:
        """Return {present, digest, stored_bytes, link_to} of the weights, if known.

        Blocks.
        """
        if self.models_dir is None:
            return {}
        try:
            manifest = store.read_manifest(self.models_dir, served_as)
            blob = store.layer_path(self.models_dir, manifest, store.MODEL_LAYER) if manifest is not None else None
        except ValueError as error:
            return {"present": False, "problem": str(error)}
        if blob is None:
            return {"present": manifest is not None}
        found: dict[str, Any] = {"present": True, "digest": blob.name.replace("-", ":", 1)}
        found["link_to"] = str(blob.readlink()) if blob.is_symlink() else None
        found["stored_bytes"] = blob.stat().st_size if blob.is_file() and not blob.is_symlink() else 0
        return found

    def _update_record(self, key: str, entry: dict[str, Any] | None) -> None:
        with _RECORD:
            record = fingerprint.read_record(self.record_path)
            stores = record.setdefault("stores", {})
            made = stores.setdefault(self.key, {})
            made.pop(key, None)
            if entry is not None:
                made[key] = entry
            fingerprint.write_record(self.record_path, record)

    def _lost_its_record(self, recipe: ModelRecipe) -> bool:
        """Return whether the store's model has fleetd's link: only its record was lost."""
        if self.models_dir is None or recipe.source is None or not recipe.source.is_file():
            return False
        return _link_digest(recipe, recipe.source).replace(":", "-") in register.named_blobs(
            self.models_dir, recipe.served_as
        )

    def _link(self, recipe: ModelRecipe, path: Path) -> str | None:
        """Link a file into the store; return the digest, None if not possible."""
        assert self.models_dir is not None
        digest = _link_digest(recipe, path)
        link = store.blob_path(self.models_dir, digest)
        try:
            if link.is_symlink() and link.readlink() == path:
                return digest
            fresh = link.with_name(link.name + f".{os.getpid()}")
            fresh.unlink(missing_ok=True)
            fresh.symlink_to(path)
            fresh.replace(link)
        except OSError:
            return None  # a file system without links, or a read-only folder
        return digest

    def _keep(self, recipe: ModelRecipe, content_hash: str, links: list[str]) -> bool:
        """Record the model, drop unused links; return whether it is in place."""
        key = store.ModelName.parse(recipe.served_as).key
        before = self.created().get(key, {}).get("link")
        named = register.named_blobs(self.models_dir, recipe.served_as) if self.models_dir is not None else frozenset()
        kept = [link for link in links if link in named]
        self._drop_links([link for link in links if link not in kept])
        if before and before not in kept:
            self._drop_links([before])
        entry = {
            "name": recipe.name,
            "served_as": recipe.served_as,
            "hash": content_hash,
            "link": kept[0] if kept else None,
            "made": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self._update_record(key, entry)
        return bool(kept)

    def _forget(self, key: str, link: str | None) -> None:
        self._update_record(key, None)
        if link:
            self._drop_links([link])

    def _drop_links(self, links: Sequence[str]) -> None:
        for link in links:
            path = self.models_dir / "blobs" / link if self.models_dir is not None else None
            if path is not None and path.is_symlink():
                path.unlink(missing_ok=True)

    def _sha256(self, path: Path, progress: Progress) -> str:
        stamp = fingerprint.stamp(path)
        record = fingerprint.read_record(self.record_path)
        known = record.get("hashes", {}).get(str(path))
        if isinstance(known, dict) and known.get("stamp") == stamp:
            return str(known["sha256"])
        digest = fingerprint.sha256(path, lambda done, total: progress("hashing", done, total))
        with _RECORD:
            record = fingerprint.read_record(self.record_path)
            record.setdefault("hashes", {})[str(path)] = {"stamp": stamp, "sha256": digest}
            fingerprint.write_record(self.record_path, record)
        return digest


def _link_digest(recipe: ModelRecipe, path: Path) -> str:
    key = store.ModelName.parse(recipe.served_as).key
    seed = f"fleetd\0{key}\0{path.name}\0{fingerprint.fingerprint(path)}"
    return "sha256:" + hashlib.sha256(seed.encode()).hexdigest()


def _tag_name(tag: Mapping[str, Any]) -> str:
    return str(tag.get("model") or tag.get("name") or "")


def _files(recipe: ModelRecipe) -> dict[Path, str]:
    """Return the files of a recipe → their request names. Raises EngineError."""
    found: dict[Path, str] = {}
    for number, path in enumerate(filter(None, (recipe.source, recipe.projector, *recipe.adapters))):
        if path.is_dir():
            inside = [file for file in sorted(path.iterdir()) if file.suffix in (".safetensors", ".json", ".model")]
            if not any(file.suffix == ".safetensors" for file in inside):
                raise EngineError(f"{recipe.name}: {path} is a folder without safetensors files", recoverable=False)
            found |= {file: file.name for file in inside}
        elif path.is_file():
            found[path] = f"{number}.gguf" if path.suffix.lower() != ".safetensors" else f"{number}.safetensors"
        else:
            hidden = invisible(str(path))
            hint = f"its name as written has {hidden}" if hidden else "is the drive mounted? Is the path right?"
            raise EngineError(f"{recipe.name}: {path} does not exist", hint=hint)
    return found


def _fingerprints(recipe: ModelRecipe) -> dict[str, str]:
    try:
        return {str(path): fingerprint.known_fingerprint(path) for path in _files(recipe)}
    except OSError as error:
        raise EngineError(f"{recipe.name}: {error.filename} cannot be read: {error.strerror}") from error
