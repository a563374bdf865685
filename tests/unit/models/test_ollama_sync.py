"""Synchronising a store with fleet.yaml, against a fake server with Ollama's routes that checks digests."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest

from bench.tiny_gguf import write
from fleetd.errors import EngineError
from fleetd.models.formats import fingerprint
from fleetd.models.ollama import register
from fleetd.models.ollama.modelfile import ModelRecipe, recipe
from fleetd.models.ollama.store import ModelName, blob_path, manifest_path, read_manifest, same_name
from fleetd.models.ollama.sync import Library, Step, StoreChange
from tests.support.engines import Server, fake


def model_file(folder: Path, name: str = "tiny model @f16.gguf", body: bytes = b"GGUF" + b"x" * 5000) -> Path:
    path = folder / name
    path.write_bytes(body)
    return path


def tiny(folder: Path) -> Path:
    return write(folder / "tiny model @f16.gguf")


def run(tmp_path: Path, work: Callable[[Server], Awaitable[None]], *args: str, store: Path | None = None) -> None:
    async def go() -> None:
        env = {"OLLAMA_MODELS": str(store)} if store is not None else {}
        async with fake(tmp_path, "ollama", "--models", "other=1000", *args, env=env) as server:
            await work(server)

    asyncio.run(go())


def library(server: Server, tmp_path: Path, models_dir: Path | None = None) -> Library:
    return Library(server.http, server.endpoint.base_url, tmp_path / "state", models_dir)


def changes(steps: list[Step]) -> dict[str, StoreChange]:
    return {step.served_as: step.change for step in steps}


async def apply(lib: Library, recipes: list[ModelRecipe]) -> dict[str, StoreChange]:
    steps = await lib.plan(recipes)
    for step in steps:
        await lib.apply(step)
    return changes(steps)


def test_library_create_update_delete(tmp_path: Path) -> None:
    path = model_file(tmp_path)

    async def work(server: Server) -> None:
        lib = library(server, tmp_path)
        first = recipe("a", "a", source=str(path), modelfile={"system": "one"})
        second = recipe("b", "b:q8", source=str(path), quantize="q8_0")
        assert await apply(lib, [first, second]) == {"a": StoreChange.CREATE, "b:q8": StoreChange.CREATE}
        assert await apply(lib, [first, second]) == {"a": StoreChange.NONE, "b:q8": StoreChange.NONE}
        os.utime(path, (1, 1))  # touched, not changed
        assert await apply(lib, [first, second]) == {"a": StoreChange.NONE, "b:q8": StoreChange.NONE}
        changed = recipe("a", "a", source=str(path), modelfile={"system": "two"})
        assert await apply(lib, [changed, second]) == {"a": StoreChange.UPDATE, "b:q8": StoreChange.NONE}
        path.write_bytes(b"GGUF" + b"y" * 5000)
        assert await apply(lib, [changed, second]) == {"a": StoreChange.UPDATE, "b:q8": StoreChange.UPDATE}
        assert await apply(lib, [changed]) == {"a": StoreChange.NONE, "b:q8": StoreChange.DELETE}
        assert await apply(lib, []) == {"a": StoreChange.DELETE}
        names = {tag["model"] for tag in (await server.get("/api/tags"))["models"]}
        assert names == {"other:latest"}
        assert path.exists()

    run(tmp_path, work)


def test_library_foreign_model_is_used_and_kept(tmp_path: Path) -> None:
    async def work(server: Server) -> None:
        lib = library(server, tmp_path)
        mine = recipe("m", "other", source=str(model_file(tmp_path)))
        assert await apply(lib, [mine, recipe("n", "other:latest", source=None)]) == {
            "other": StoreChange.FOREIGN,
            "other:latest": StoreChange.NONE,
        }
        wanted = recipe("m", "other", source=str(model_file(tmp_path)), modelfile={"parameters": {"num_ctx": 2048}})
        assert (await lib.plan([wanted]))[0].reason.endswith("used unchanged, without num_ctx of fleet.yaml")
        with pytest.raises(EngineError, match="not created by fleetd"):
            await lib.delete("other")

    run(tmp_path, work)


def test_library_missing_file_is_reported(tmp_path: Path) -> None:
    async def work(server: Server) -> None:
        lib = library(server, tmp_path)
        gone = recipe("g", "g", source="/Volumes/BOWIE/x\u00a0y.gguf")
        steps = await lib.plan([gone, recipe("n", "n", source=None)])
        assert [step.change for step in steps] == [StoreChange.MISSING, StoreChange.MISSING]
        assert "/Volumes/BOWIE" in steps[0].reason
        with pytest.raises(EngineError, match="does not exist") as caught:
            await lib.apply(steps[0])
        assert caught.value.recoverable  # the drive may come back
        with pytest.raises(EngineError, match=r"models\.n\.from") as other:
            await lib.apply(steps[1])
        assert not other.value.recoverable

    run(tmp_path, work)


def test_library_upload_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_file(tmp_path)
    hashed: list[Path] = []
    real = fingerprint.sha256
    monkeypatch.setattr(fingerprint, "sha256", lambda path, progress: (hashed.append(path), real(path, progress))[1])

    async def work(server: Server) -> None:
        seen: list[str] = []
        lib = library(server, tmp_path)
        await lib.ensure(recipe("a", "a", source=str(path)), lambda phase, done, total: seen.append(phase))
        await lib.ensure(recipe("b", "b", source=str(path)))
        assert hashed == [path]
        assert {"hashing", "uploading", "parsing GGUF", "success"} <= set(seen)
        path.write_bytes(b"GGUF" + b"z" * 100)
        await lib.ensure(recipe("b", "b", source=str(path)))
        assert hashed == [path, path]

    run(tmp_path, work)


@pytest.mark.parametrize("shared", [True, False])
def test_library_links_in_shared_store_else_uploads(tmp_path: Path, shared: bool) -> None:
    path, store = tiny(tmp_path), tmp_path / "store"
    (store / "blobs").mkdir(parents=True)

    async def work(server: Server) -> None:
        seen: list[str] = []
        lib = library(server, tmp_path, store)
        await lib.ensure(recipe("a", "a", source=str(path)), lambda phase, done, total: seen.append(phase))
        links = [entry.resolve() for entry in (store / "blobs").iterdir() if entry.is_symlink()]
        if shared:  # the fake reports a version above 0.30: registered by its manifest, never sent
            assert (links, "uploading" in seen, "in place" in seen) == ([path], False, True)
            assert register.named_blobs(store, "a") >= {entry.name for entry in (store / "blobs").iterdir()}
        else:
            assert (links, "uploading" in seen) == ([], True)
            assert not (store / "manifests").exists()
            assert "a:latest" in {tag["model"] for tag in (await server.get("/api/tags"))["models"]}

    run(tmp_path, work, store=store if shared else None)


def test_library_failed_stream_leaves_nothing(tmp_path: Path) -> None:
    path, store = model_file(tmp_path), tmp_path / "store"
    (store / "blobs").mkdir(parents=True)

    async def work(server: Server) -> None:
        lib = library(server, tmp_path, store)
        with pytest.raises(EngineError, match="unsupported architecture"):
            await lib.ensure(recipe("a", "a", source=str(path)))
        assert list((store / "blobs").iterdir()) == []
        assert changes(await lib.plan([recipe("a", "a", source=str(path))])) == {"a": StoreChange.CREATE}

    # fleetd cannot read the file, so the server is asked
    run(tmp_path, work, "--fail-load", store=store)


def test_library_other_server_raises_one_sentence(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "openai") as server:
            with pytest.raises(EngineError, match="/api/tags") as caught:
                await library(server, tmp_path).plan([])
            assert "\n" not in str(caught.value)
            server.process.kill()
            server.process.wait()
            with pytest.raises(EngineError, match="failed"):
                await library(server, tmp_path).plan([])

    asyncio.run(go())


# -- files --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [0, 1, 1000, fingerprint.BLOCK_BYTES, 5 * fingerprint.BLOCK_BYTES, 3_000_000])
def test_fingerprint_changes_with_content_only(tmp_path: Path, size: int) -> None:
    one, same = tmp_path / "one", tmp_path / "same"
    body = bytes(range(256)) * (size // 256 + 1)
    one.write_bytes(body[:size])
    same.write_bytes(body[:size])
    assert fingerprint.fingerprint(one) == fingerprint.fingerprint(same)
    same.write_bytes(body[:size] + b"!")
    assert fingerprint.fingerprint(one) != fingerprint.fingerprint(same)
    if size:
        for place in (0, size - 1):
            changed = bytearray(body[:size])
            changed[place] ^= 1
            same.write_bytes(bytes(changed))
            assert fingerprint.fingerprint(one) != fingerprint.fingerprint(same)


@pytest.mark.parametrize("text", ["", "[]", "{", '{"stores": 5}', '{"stores": {"x": 3}}', "\x00"])
def test_read_record_damaged_counts_as_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "models.json").write_text(text)
    path = model_file(tmp_path)

    async def work(server: Server) -> None:
        lib = library(server, tmp_path)
        if text != '{"stores": 5}':
            await lib.ensure(recipe("a", "a", source=str(path)))
            assert changes(await lib.plan([recipe("a", "a", source=str(path))])) == {"a": StoreChange.NONE}
        else:
            assert await lib.plan([]) == []

    run(tmp_path, work)


@pytest.mark.parametrize(
    ("text", "short"),
    [
        ("a", "a:latest"),
        ("me/a:1", "me/a:1"),
        ("library/a", "a:latest"),
        ("registry.ollama.ai/library/a", "a:latest"),
        ("host:5000/me/a:b", "host:5000/me/a:b"),
    ],
)
def test_model_name_short_form(text: str, short: str) -> None:
    assert ModelName.parse(text).short == short
    assert same_name(text, short.upper())


@pytest.mark.parametrize(
    "text", ["", "a@b", "a:", ":a", "a/b/c/d", "../a", "a b", ".a", "a" * 81, "ns.x/a", "a:b:c", "\u00e9"]
)
def test_model_name_invalid_raises(text: str) -> None:
    with pytest.raises(ValueError, match="not a model name"):
        ModelName.parse(text)


def test_store_damaged_manifest_raises(tmp_path: Path) -> None:
    name = ModelName.parse("Tiny")
    assert manifest_path(tmp_path, name) is None
    assert read_manifest(tmp_path, "tiny") is None
    path = tmp_path / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"layers": []}))
    assert manifest_path(tmp_path, name) == path  # case is ignored
    path.write_text("[1]")
    with pytest.raises(ValueError, match="JSON object"):
        read_manifest(tmp_path, "tiny")
    for digest in ("sha256:../../etc/passwd", "md5:00", "sha256:" + "0" * 63):
        with pytest.raises(ValueError, match="not a sha256 digest"):
            blob_path(tmp_path, digest)
