"""Every verb of `fleetctl` against a fleet in memory: exit codes, and what goes where."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml

from fleetd.cli.fleetctl import run
from tests.support.cli import Ran, fake_fleet, fleetctl

TABLE = [
    (["status"], 0, "ollama-1"),
    (["status", "web"], 0, "Main PID: 4711"),
    (["status", "ulysses"], 0, "gpu0 3.0G + host 1.0G"),
    (["status", "gpt-3.5-turbo"], 0, "ulysses"),
    (["status", "org/coder:7b"], 3, "ABSENT"),
    (["status", "broken"], 3, "cannot find module x"),
    (["status", "slow"], 3, "STARTING"),
    (["status", "ollama"], 0, "ollama-2"),
    (["status", "ollama*", "web"], 0, "ollama-2"),
    (["status", "web", "broken"], 3, "broken"),
    (["status", "nope"], 4, ""),
    (["status", "web", "nope"], 4, ""),
    (["status", "nope*"], 4, ""),
    (["status", "-o", "wide"], 0, "FOOTPRINT"),
    (["status", "-o", "name"], 0, "web\n"),
    (["status", "-o", "xml"], 2, ""),
    (["ps"], 0, "75% gpu0 25% host"),
    (["ps", "-o", "name"], 0, "ulysses\n"),
    (["start", "web"], 0, "ok"),
    (["start", "web", "ollama"], 0, "ollama-2"),
    (["start", "broken"], 1, "exit code 1"),
    (["start", "slow", "--timeout", "50ms"], 6, "timeout"),
    (["start", "slow", "broken", "--timeout", "50ms"], 1, "timeout"),
    (["start", "slow", "--no-wait"], 0, "accepted"),
    (["start", "nope"], 4, ""),
    (["start", "web", "nope"], 4, ""),
    (["start", "ulysses"], 4, ""),
    (["start"], 2, ""),
    (["start", "web", "--timeout", "soon"], 2, ""),
    (["start", "web", "--timeout", "7"], 0, "ok"),
    (["stop", "we*"], 0, "ok"),
    (["stop", "all", "--no-wait"], 0, "slow"),
    (["restart", "ollama-1"], 0, "ok"),
    (["drain", "ollama-1"], 0, "ok"),
    (["undrain", "ollama-1"], 0, "ok"),
    (["signal", "HUP", "web"], 0, "ok"),
    (["signal", "nonsense", "web"], 2, ""),
    (["signal", "HUP", "nope"], 4, ""),
    (["load", "ulysses"], 0, "ok"),
    (["load", "org/coder:7b"], 1, ""),
    (["load", "web"], 4, ""),
    (["unload", "gpt-3.5-turbo"], 0, "ulysses"),
    (["pin", "ulysses"], 0, "ok"),
    (["unpin", "ulysses"], 0, "ok"),
    (["logs", "web", "-n", "2"], 0, "web says 1"),
    (["logs", "ollama", "-n", "1"], 0, "ollama-2 | ollama-2 says 0"),
    (["logs", "web", "--grep", "says 7"], 0, "web says 7"),
    (["logs", "web", "--grep", "("], 2, ""),
    (["logs", "web", "--since", "10m"], 0, "web says 999"),  # all of them, not the last fifty
    (["logs", "nope"], 4, ""),
    (["logs", "web", "nope"], 4, ""),
    (["events"], 0, "web exited READY → BACKOFF: code 1"),
    (["story", "web"], 0, "exited"),
    (["story", "nope"], 4, ""),
    (["explain", "ulysses"], 0, "10G free of a budget of 13G"),
    (["explain", "nope"], 4, ""),
    (["dump"], 0, '"journal"'),
    (["reload"], 0, "5 processes unchanged"),
    (["version"], 0, "fleetd 0.1.0"),
    (["pm2-jlist"], 0, '"pm2_env"'),
    (["completion", "bash"], 0, "_FLEETCTL_COMPLETE"),
    (["completion", "zsh"], 0, "#compdef fleetctl"),
    (["completion", "fish"], 0, "fleetctl"),
    (["completion", "tcsh"], 2, ""),
    (["install-service", "--user", "--print"], 0, "Type=notify"),
    (["--help"], 0, "Exit codes"),
    (["status", "-h"], 0, "exit code is 0 for running"),
    (["statsu"], 2, ""),
    (["status", "--wat"], 2, ""),
    ([], 2, ""),
]


@pytest.mark.parametrize(("arguments", "code", "text"), TABLE, ids=lambda value: str(value)[:40])
def test_verbs(fleet: Path, arguments: list[str], code: int, text: str) -> None:
    ran = fleetctl("--socket", str(fleet), *arguments)
    assert ran.code == code, ran
    assert text in ran.out
    if code in (2, 4):
        assert ran.err.strip(), "a mistake is explained on standard error"
        assert ran.out == "" or not arguments


def on(fleet: Path, *arguments: str) -> Ran:
    return fleetctl(*arguments, FLEETD_SOCKET=str(fleet))


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["status", "wbe"], "did you mean web?"),
        (["start", "ulysses"], "fleetctl load ulysses"),
        (["load", "ollama"], "fleetctl start ollama"),
        (["statsu"], "Did you mean status?"),
        (["load", "org/coder:7b"], "needs 30 GiB"),
        (["start", "broken"], "broken: exit code 1"),
    ],
)
def test_problem_is_explained_in_the_view(fleet: Path, typed: list[str], hint: str) -> None:
    assert hint in on(fleet, *typed).err


# -- JSON and YAML ------------------------------------------------------------------------------------------------------

DOCUMENTS = [
    (["status"], {"name", "ready", "daemon", "devices", "processes", "models"}),
    (["status", "web"], {"process", "models", "events", "log"}),
    (["status", "ulysses"], {"model", "events"}),
    (["status", "ollama*"], {"processes", "models"}),
    (["ps"], {"models"}),
    (["start", "web"], {"verb", "results"}),
    (["pin", "ulysses"], {"verb", "results"}),
    (["story", "web"], {"name", "events"}),
    (["explain", "ulysses"], {"model", "state", "footprint", "text"}),
    (["dump"], {"status", "journal"}),
    (["reload"], {"plan", "results"}),
    (["version"], {"fleetctl", "fleetd"}),
]


@pytest.mark.parametrize(("arguments", "keys"), DOCUMENTS, ids=[" ".join(arguments) for arguments, _ in DOCUMENTS])
def test_documents(fleet: Path, arguments: list[str], keys: set[str]) -> None:
    from_json = json.loads(on(fleet, *arguments, "-o", "json").out)
    assert from_json["schema"] == "fleetctl/v1"
    assert next(iter(from_json)) == "schema"
    assert keys <= set(from_json)
    before_the_verb = on(fleet, "-o", "json", *arguments)
    assert json.loads(before_the_verb.out).keys() == from_json.keys()
    if arguments != ["dump"]:
        assert yaml.safe_load(on(fleet, *arguments, "-o", "yaml").out).keys() == from_json.keys()


def test_status_document_matches_the_contract(fleet: Path) -> None:
    document = json.loads(on(fleet, "status", "-o", "json").out)
    for process in document["processes"]:
        assert {"name", "kind", "engine", "state", "desired", "reason", "pid", "generation", "port", "restarts"} <= set(
            process
        )
        assert process["rss_bytes"] is None or isinstance(process["rss_bytes"], int)
    moments = [document["models"][0]["last_used"], document["processes"][3]["last_exit"]["at"]]
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d+)?Z", moment) for moment in moments)


def test_streams_are_json_lines(fleet: Path) -> None:
    for arguments in (["events"], ["logs", "web", "-n", "3"]):
        lines = [json.loads(line) for line in on(fleet, *arguments, "-o", "json").out.splitlines()]
        assert len(lines) >= 3
        assert all(line["schema"] == "fleetctl/v1" for line in lines)


def test_failed_action_is_a_document(fleet: Path) -> None:
    ran = on(fleet, "start", "broken", "web", "-o", "json")
    assert ran.code == 1
    assert [row["result"] for row in json.loads(ran.out)["results"]] == ["failed", "ok"]


def test_jlist_has_the_keys_that_scripts_read(fleet: Path) -> None:
    entries = json.loads(on(fleet, "pm2-jlist").out)
    found = {entry["name"]: entry for entry in entries}
    assert found["web"]["pm2_env"]["status"] == "online"
    assert found["broken"]["pm2_env"]["status"] == "errored"
    assert found["broken"]["pm2_env"]["restart_time"] == 5
    assert found["web"]["monit"] == {"memory": 52 * 1024**2, "cpu": 1.5}
    assert [entry["pm_id"] for entry in entries] == [0, 1, 2, 3, 4]


# -- plans --------------------------------------------------------------------------------------------------------------


@pytest.fixture
def files(tmp_path: Path) -> Path:
    for name, text in (("same", "same"), ("other", "other"), ("bad", "bad"), ("locked", "other")):
        (tmp_path / f"{name}.yaml").write_text(text)
    return tmp_path


def test_diff_codes(fleet: Path, files: Path) -> None:
    assert on(fleet, "diff").code == 0
    assert on(fleet, "diff", str(files / "same.yaml")) == Ran(0, "", "")
    changed = on(fleet, "diff", str(files / "other.yaml"))
    assert changed.code == 1
    assert "+ service new (start)" in changed.out
    assert "services.web.env.A: 1 → 2 (restart)" in changed.out
    assert "− instance old (stop)" in changed.out
    bad = on(fleet, "diff", str(files / "bad.yaml"))
    assert (bad.code, bad.out) == (2, "")
    assert ":4:7: services.x.port" in bad.err
    assert ":9:1: modles" in bad.err
    assert on(fleet, "diff", str(files / "absent.yaml")).code == 2
    assert fleetctl("diff", "-", stdin="other", FLEETD_SOCKET=str(fleet)).code == 1


def test_apply(fleet: Path, files: Path) -> None:
    other = str(files / "other.yaml")
    dry = on(fleet, "apply", other, "--dry-run")
    assert dry.code == 0
    assert "1 to add, 1 to change, 1 to remove" in dry.out
    unasked = on(fleet, "apply", other)
    assert unasked.code == 2
    assert "use -y" in unasked.err
    done = on(fleet, "apply", other, "-y", "--wait")
    assert done.code == 0
    assert "ok" in done.out
    assert on(fleet, "apply", str(files / "bad.yaml"), "-y").code == 2
    locked = on(fleet, "apply", str(files / "locked.yaml"), "-y")
    assert locked.code == 1
    assert "Locked by pid 42" in locked.err
    assert on(fleet, "apply", str(files / "same.yaml")).code == 0
    assert on(fleet, "apply").code == 0
    assert on(fleet, "apply", "-").code == 2
    document = json.loads(on(fleet, "apply", other, "-y", "-o", "json").out)
    assert document["plan"]["config_hash"] == "def456"
    assert len(document["results"]) == 3


# -- ends ---------------------------------------------------------------------------------------------------------------


def test_shutdown_waits_for_the_end(short: Path) -> None:
    with fake_fleet(short) as path:
        ran = on(path, "shutdown")
        assert (ran.code, ran.out) == (0, "")
        assert not path.exists()
        assert on(path, "status").code == 5


def test_shutdown_without_waiting(short: Path) -> None:
    with fake_fleet(short) as path:
        assert json.loads(on(path, "shutdown", "--force", "--no-wait", "-o", "json").out)["accepted"] is True


def test_shutdown_waits_for_the_lock(short: Path) -> None:
    import fcntl

    with fake_fleet(short) as path, (path.parent / "fleetd.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        ran = on(path, "shutdown", "--timeout", "500ms")
        assert ran.code == 6
        assert "still stopping" in ran.err


def test_reexec_that_does_not_happen_is_a_timeout(fleet: Path) -> None:
    assert on(fleet, "daemon-reexec", "--timeout", "300ms").code == 6


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../web", "/", "a/b", "?x", "%2e", "#", "\n", "x" * 20_000, "日本", "\x1b[31m", "[", "we[b"]
)
@pytest.mark.parametrize(
    "verb", [["status"], ["story"], ["explain"], ["start"], ["load"], ["logs"]], ids=lambda value: value[0]
)
def test_odd_names_are_unknown_names(
    fleet: Path, verb: list[str], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code = run(["--socket", str(fleet), *verb, name])
    shown = capsys.readouterr()
    assert (code, shown.out) == (4, ""), shown
    assert len(shown.err.splitlines()) <= 2
    assert "\x1b" not in shown.err
