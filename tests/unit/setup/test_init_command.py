"""`fleetctl init` as a person meets it: the file, the questions, the exit codes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from bench.tiny_gguf import write
from fleetd.config.load import load
from fleetd.setup import fleet_file
from fleetd.setup.proposal import FleetProposal
from tests.support.cli import Ran, fleetctl, on_terminal

ODD = "ü $HOME ${X} #x: {port} 'y'\nz.gguf"


@pytest.fixture
def models(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write(folder / "tiny.gguf", layers=2, seed=1, name="tiny")
    return folder


def init(tmp_path: Path, *arguments: str) -> Ran:
    return fleetctl("init", "--file", str(tmp_path / "fleet.yaml"), *arguments, HOME=str(tmp_path))


def test_init_writes_a_file_that_passes_the_check(tmp_path: Path, models: Path) -> None:
    write(models / ODD, layers=2, seed=2, name="odd")
    (models / "cut.gguf").write_bytes((models / "tiny.gguf").read_bytes()[:-4096])
    ran = init(tmp_path, str(models))
    assert ran.code == 0, ran.err
    file = tmp_path / "fleet.yaml"
    assert ran.out == f"{file}\n"
    loaded = load(file, {})
    paths = {name: dict(model.options)["model"] for name, model in loaded.config.models.items()}  # type: ignore[union-attr]
    assert paths["tiny"] == str(models / "tiny.gguf")
    assert str(models / ODD) in paths.values()
    assert len(paths) == 2
    assert "cut off" in ran.err
    assert f"fleetd run --config {file}" in ran.err


def test_init_never_overwrites_without_force(tmp_path: Path, models: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("mine")
    ran = init(tmp_path, "--yes")
    assert (ran.code, "already exists" in ran.err, "--force" in ran.err) == (1, True, True)
    assert file.read_text() == "mine"
    assert init(tmp_path, "--force", str(models)).code == 0
    assert "tiny" in yaml.safe_load(file.read_text())["models"]
    assert [entry.name for entry in tmp_path.glob(".fleet.yaml*")] == []
    file.unlink()
    file.symlink_to(tmp_path / "missing")
    assert init(tmp_path, "--yes").code == 1, "a dangling link is not replaced either"


def test_init_on_an_empty_machine_writes_a_useful_file(tmp_path: Path) -> None:
    ran = init(tmp_path)
    assert ran.code == 0
    text = (tmp_path / "fleet.yaml").read_text()
    assert load(tmp_path / "fleet.yaml", {}).config.models == {}
    assert "# models:" in text
    assert "no model was found" in ran.err
    assert "fleetctl status" in ran.err


def test_init_prints_without_writing(tmp_path: Path, models: Path) -> None:
    ran = init(tmp_path, "--print", str(models))
    assert ran.code == 0
    assert list(yaml.safe_load(ran.out)["models"]) == ["tiny"]
    assert not (tmp_path / "fleet.yaml").exists()


def test_init_in_json_names_what_was_found(tmp_path: Path, models: Path) -> None:
    ran = init(tmp_path, "-o", "json", str(models))
    document = json.loads(ran.out)
    assert document["schema"] == "fleetctl/v1"
    assert document["models"] == ["tiny"]
    assert document["next"] == [f"fleetd run --config {tmp_path}/fleet.yaml", "fleetctl chat tiny hello"]


@pytest.mark.parametrize(("typed", "code", "written"), [("\n", 0, True), ("n\n", 1, False), ("\x04", 130, False)])
def test_init_on_a_terminal_asks_before_it_writes(
    tmp_path: Path, models: Path, typed: str, code: int, written: bool
) -> None:
    file = tmp_path / "fleet.yaml"
    ran = on_terminal("init", "--file", str(file), str(models), typed=typed, HOME=str(tmp_path))
    assert ran.code == code, ran.err
    assert file.exists() is written


@pytest.mark.parametrize("arguments", [("/nonexistent/folder",), ("--file", "/"), ("-o", "wide")])
def test_init_rejects_wrong_arguments(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert init(tmp_path, *arguments).code == 2


def test_init_that_cannot_write_says_so(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    ran = fleetctl("init", "--file", str(tmp_path / "file" / "fleet.yaml"), HOME=str(tmp_path))
    assert ran.code == 1
    assert "file/fleet.yaml" in ran.err


def test_write_keeps_a_link_and_needs_no_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real.yaml").write_text("old")
    (tmp_path / "fleet.yaml").symlink_to("real.yaml")
    fleet_file.write(tmp_path / "fleet.yaml", "new", replace=True)
    assert (tmp_path / "fleet.yaml").is_symlink()
    assert (tmp_path / "real.yaml").read_text() == "new"

    def refuse(*_: object) -> None:
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    fleet_file.write(tmp_path / "second.yaml", "x", replace=False)
    assert (tmp_path / "second.yaml").read_text() == "x"
    with pytest.raises(FileExistsError):
        fleet_file.write(tmp_path / "second.yaml", "y", replace=False)
    assert len(list(tmp_path.iterdir())) == 3


def test_verified_leaves_out_what_the_check_rejects() -> None:
    proposal = FleetProposal(
        {
            "version": 1,
            "models": {"a.b": {"engine": "llamacpp", "options": {"modell": "x"}}, "a": {"route": [{"to": "c"}]}},
        }
    )
    text, _ = fleet_file.verified(proposal, dict(os.environ))
    assert set(proposal.left_out) == {"a", "a.b"}
    assert "# Found, and left out:\n#   a" in text


def test_init_is_a_verb_of_fleetctl() -> None:
    assert "--force" in fleetctl("init", "--help").out


def test_init_with_ollama_and_its_store_passes_the_check(tmp_path: Path) -> None:
    program = tmp_path / "bin" / "ollama"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho ollama version is 0.35.0\n")
    program.chmod(0o755)
    store = tmp_path / "data"
    blob = store / "blobs" / f"sha256-{'a' * 64}"
    blob.parent.mkdir(parents=True)
    write(blob, layers=1, seed=1, name="x")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "1b"
    manifest.parent.mkdir(parents=True)
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": f"sha256:{'a' * 64}", "size": 1}
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": [layer]}))
    (tmp_path / "w").mkdir()
    write(tmp_path / "w" / "own.gguf", layers=1, seed=2, name="own")
    path = f"{program.parent}:{os.environ['PATH']}"
    arguments = ("init", "--print", str(store), str(tmp_path / "w"))
    ran = fleetctl(*arguments, HOME=str(tmp_path / "home"), PATH=path)
    document = yaml.safe_load(ran.out)
    assert document["instances"]["ollama"]["options"] == {"models_dir": str(store)}
    assert document["models"]["tiny:1b"] == {"instance": "ollama"}
    assert "ollama 0.35.0" in ran.err
    assert "left out tiny" not in ran.err
    assert len(document["models"]) == 2
    bare = fleetctl(*arguments, HOME=str(tmp_path / "home"))
    entry = yaml.safe_load(bare.out)["models"]["tiny-1b"]
    assert (entry["engine"], entry["aliases"]) == ("llamacpp", ["tiny:1b"]), "without Ollama, its files are served"


def test_documents_of_every_engine_pass_the_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ollama", "vllm", "mlx_lm.server", "lms"):
        (tmp_path / name).write_text("#!/bin/sh\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    command = ["mlx_lm.server", "--model", "/h/q", "--host", "127.0.0.1", "--port", "{port}"]
    models = {
        "a": {"instance": "ollama", "from": "/m/a.gguf"},
        "b": {"instance": "lmstudio", "embedding": True},
        "c": {"instance": "server-8000", "served_as": "a b"},
        "d": {"engine": "vllm", "options": {"model": "/h/q", "max_model_len": 8192, "gpu_memory_utilization": 0.5}},
        "e": {
            "engine": "process",
            "command": command,
            "served_as": "/h/q",
            "memory": {"host": 1000},
            "options": {"health": "/health"},
        },
        "f": {
            "engine": "llamacpp",
            "device": "host",
            "options": {"model": "/m/f.gguf", "rerank": True, "context_length": 512},
        },
    }
    instances = {
        "ollama": {"engine": "ollama", "port": 11434},
        "lmstudio": {"engine": "lmstudio", "external": "http://127.0.0.1:1234"},
        "server-8000": {"engine": "external", "external": "http://127.0.0.1:8000"},
    }
    proposal = FleetProposal({"version": 1, "instances": instances, "models": dict(models)})
    fleet_file.verified(proposal, dict(os.environ))
    assert proposal.left_out == {}
    assert proposal.models == models
