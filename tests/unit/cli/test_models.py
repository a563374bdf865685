"""`fleetctl audit`, `migrate`, `models scan` and `import ollama` on folders: none of them needs a daemon."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.tiny_gguf import write
from fleetd.cli.commands.audit import references_in
from fleetd.models.ollama.inventory import Stored
from fleetd.models.ollama.migration import propose, source_of
from tests.support.cli import fleetctl


@pytest.mark.parametrize(
    ("line", "kinds"),
    [
        ("import { Ollama } from 'ollama'", ["import"]),
        ("const o = require('ollama')", ["import"]),
        ("from ollama import chat", ["import"]),
        ("import ollama", ["import"]),
        ("from langchain_ollama import ChatOllama", ["import"]),
        ("llm = ChatOllama(model='x')", ["import"]),
        ("base = os.environ['OLLAMA_HOST'] or 'http://localhost:11434'", ["env", "port"]),
        ("curl http://10.0.0.3:11436/api/tags", ["port", "route"]),
        ("url: http://ollama:80/api/chat", ["host", "route"]),
        ('"ollama": "^0.5.0",', ["package"]),
        ("ollama>=0.4", ["package"]),
        ("image: ollama/ollama:latest", ["package"]),
        ("npm install x ollama", ["package"]),
        ("ollama serve &", ["cli"]),
        ("/opt/homebrew/bin/ollama serve", ["cli"]),
        ('spawn("ollama", ["pull", name])', ["cli"]),
        ("engine: ollama", ["config"]),
        ('model="ollama/llama3"', ["model name"]),
        ("// ollama was nice", []),
        ("fetch('/api/chat')", []),  # nothing in this text names Ollama
        ("let n = 114340", []),
    ],
)
def test_audit_references_table(line: str, kinds: list[str]) -> None:
    assert [one.kind for one in references_in(line, "f")] == kinds


def test_audit_counts_by_kind_and_file(tmp_path: Path) -> None:
    (tmp_path / "node_modules" / "x").mkdir(parents=True)
    (tmp_path / "node_modules" / "x" / "a.js").write_text("ollama serve")
    (tmp_path / "a.ts").write_text("// x\nconst h = 'http://localhost:11434'\nfetch(h + '/api/chat')\n")
    (tmp_path / "b.bin").write_bytes(b"\0ollama serve")
    (tmp_path / "huge.txt").write_bytes(b"ollama serve\n" * 200_000)
    ran = fleetctl("audit", "ollama", str(tmp_path), "-o", "json")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["by_kind"] == {"port": 1, "route": 1}
    assert [(row["file"], row["total"]) for row in found["by_file"]] == [(str(tmp_path / "a.ts"), 2)]
    assert [(ref["line"], ref["column"]) for ref in found["references"]] == [(2, 29), (3, 12)]
    assert found["skipped"] == {"binary": 1, "larger than 2 MiB": 1}
    table = fleetctl("audit", "ollama", str(tmp_path))
    assert (table.code, "port 1, route 1" in table.out) == (1, True)
    (tmp_path / "a.ts").unlink()
    assert fleetctl("audit", "ollama", str(tmp_path)).code == 0
    gone = fleetctl("audit", "ollama", str(tmp_path / "nope"))
    assert (gone.code, "No such file" in gone.err) == (2, True)


def stored(name: str, **keys: Any) -> Stored:
    return Stored(name, Path("/x"), 1, "llama", 4096, keys={f"general.{key}": value for key, value in keys.items()})


@pytest.mark.parametrize(
    ("keys", "source"),
    [
        ({"source.url": "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct"}, "Qwen/Qwen2.5-7B-Instruct"),
        ({"source.huggingface.repository": "a/b"}, "a/b"),
        ({"base_model.0.repo_url": "https://huggingface.co/meta/L"}, "meta/L"),
        ({"source.url": "https://huggingface.co/x/y-GGUF", "base_model.0.repo_url": "https://hf.co/x/y"}, "x/y"),
        ({"source.url": "https://example.com/a/b"}, None),
        ({"source.url": 7}, None),
        ({}, None),
    ],
)
def test_where_the_safetensors_of_a_gguf_are(keys: dict[str, Any], source: str | None) -> None:
    found = source_of(stored("m:latest", **keys))
    assert (found[0] if found else None) == source


def test_migrate_routes_known_and_reports_unknown_sources() -> None:
    known = stored("coder:7b", **{"source.url": "https://huggingface.co/q/c"})
    proposal = propose([known, stored("odd:latest")], {"coder:7b": "coder"}, vllm_weight=25, device="gpu0")
    assert proposal.models["coder"] == {
        "route": [{"to": "coder-vllm", "weight": 25}, {"to": "coder-ollama", "weight": 75}]
    }
    assert proposal.models["coder-ollama"]["fallback"] == ["coder-vllm"]
    assert proposal.models["coder-vllm"] == {
        "engine": "vllm",
        "device": "gpu0",
        "options": {"model": "q/c", "max_model_len": 4096},
        "fallback": ["coder-ollama"],
    }
    assert proposal.models["odd"] == {"instance": "ollama", "served_as": "odd:latest"}
    assert "names no safetensors source" in proposal.unknown["odd"]


def store_with(folder: Path, name: str) -> None:
    """Lay out one model as Ollama does."""
    digest = "a" * 64
    (folder / "blobs").mkdir(parents=True)
    write(folder / "blobs" / f"sha256-{digest}", layers=1, embedding=64)
    manifest = folder / "manifests" / "registry.ollama.ai" / "library" / name / "latest"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{digest}", "size": 1}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))


def test_store_folder_works_without_a_daemon(tmp_path: Path) -> None:
    store_with(tmp_path / "store", "tiny")
    (tmp_path / "store" / "manifests" / "registry.ollama.ai" / "library" / "bad").mkdir()
    (tmp_path / "store" / "manifests" / "registry.ollama.ai" / "library" / "bad" / "latest").write_text("{")
    imported = fleetctl("import", "ollama", str(tmp_path / "store"))
    assert (imported.code, "tiny" in imported.out, "bad:latest" in imported.err) == (0, True, True)
    assert f"models_dir: {tmp_path / 'store'}" in imported.out
    migrated = fleetctl("migrate", "ollama-to-vllm", str(tmp_path / "store"), "-o", "json")
    assert migrated.code == 0
    assert json.loads(migrated.out)["models"] == {"tiny": {"instance": "ollama", "served_as": "tiny:latest"}}
    assert "0 of 1 models have a known source" in migrated.err
    assert fleetctl("migrate", "ollama-to-vllm", str(tmp_path)).code == 2
    write(tmp_path / "files" / "My Model_f16.gguf", layers=1, embedding=64)
    scanned = fleetctl("models", "scan", str(tmp_path / "files"), "--instance", "ollama", "-o", "json")
    assert scanned.code == 0
    assert [row["entry"]["instance"] for row in json.loads(scanned.out)["models"]] == ["ollama"]
    assert fleetctl("models", "scan", str(tmp_path / "nope")).code == 2
