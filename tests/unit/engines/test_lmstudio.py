"""The engine `lmstudio`: explicit loads, the shape of every answer, and the process that runs `lms`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from fleetd.core.data.specs import ExitKind
from fleetd.engines.base import LaunchContext, ServedModel
from fleetd.engines.lmstudio import engine
from fleetd.engines.lmstudio.model_server import LmStudioServer
from fleetd.engines.lmstudio.options import LmStudioOptions
from fleetd.errors import EngineError
from tests.support.engines import FAKE, fake
from tests.support.ports import free_port
from tests.support.waiting import until

ENGINE, SERVER = engine.ENGINE, LmStudioServer()
CHILD = Path(engine.__file__).with_name("server_main.py")


def context(**changes: Any) -> LaunchContext:
    values = {"name": "studio", "host": "127.0.0.1", "port": 1234, "options": LmStudioOptions(), **changes}
    return LaunchContext(**values)


# -- models -------------------------------------------------------------------------------------------------------------


def test_server_loads_lists_and_unloads(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "lmstudio", "--models", "a=1000,b-embed=2000") as server:
            http, endpoint = server.http, server.endpoint
            a, b = ServedModel("A", "a", options={"context_length": 512}), ServedModel("B", "b-embed", embedding=True)
            assert await SERVER.load(http, endpoint, a, 5) == {"gpu": 1000}
            assert await SERVER.load(http, endpoint, a, 5) == {"gpu": 1000}  # already loaded: no second instance
            assert await SERVER.load(http, endpoint, b, 5) == {"gpu": 2000}
            listed = await server.get("/api/v1/models")
            loaded = {model["key"]: model["loaded_instances"] for model in listed["models"]}
            assert [len(instances) for instances in loaded.values()] == [1, 1]
            assert loaded["a"][0]["config"]["context_length"] == 512
            residents = {one.served_as: one.context_length for one in await SERVER.loaded(http, endpoint)}
            assert residents == {"a": 512, "b-embed": 4096}
            for model in (None, a, b):
                outcome = await ENGINE.alive(http, endpoint, model, 5)
                assert outcome.ok
                assert "one token" in outcome.detail
            await SERVER.unload(http, endpoint, a, 5)
            assert [resident.served_as for resident in await SERVER.loaded(http, endpoint)] == ["b-embed"]
            await SERVER.unload(http, endpoint, a, 5)

    asyncio.run(go())


def test_alive_never_causes_a_load(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "lmstudio", "--models", "a=1000") as server:
            for model in (None, ServedModel("A", "a")):
                assert (await ENGINE.alive(server.http, server.endpoint, model, 5)).ok
            assert await SERVER.loaded(server.http, server.endpoint) == ()

    asyncio.run(go())


@pytest.mark.parametrize(
    ("arguments", "name", "text", "recoverable"),
    [
        (("--models", "a"), "nope", "has no model nope", False),
        (("--models", "a", "--fail-load"), "a", "insufficient resources", True),
    ],
)
def test_load_failure_is_an_error(
    tmp_path: Path, arguments: tuple[str, ...], name: str, text: str, recoverable: bool
) -> None:
    async def go() -> None:
        async with fake(tmp_path, "lmstudio", *arguments) as server:
            with pytest.raises(EngineError, match=text) as caught:
                await SERVER.load(server.http, server.endpoint, ServedModel("m", name), 5)
            assert caught.value.recoverable is recoverable

    asyncio.run(go())


def test_loaded_from_another_server_is_an_error(tmp_path: Path) -> None:
    async def go() -> None:
        async with fake(tmp_path, "openai") as server:
            with pytest.raises(EngineError, match="does not list models in the format of LM Studio"):
                await SERVER.loaded(server.http, server.endpoint)
            assert not (await ENGINE.alive(server.http, server.endpoint, None, 5)).ok

    asyncio.run(go())


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"ttl": 5}, "takes context_length"),
        ({"context_length": "many"}, "a whole number"),
        ({"context_length": True}, "a whole number"),
        ({"flash_attention": 1}, "true or false"),
    ],
)
def test_validate_load_option_mistake_is_reported(options: Mapping[str, Any], text: str) -> None:
    found = ENGINE.validate(context(models=(ServedModel("m", "a", options=options),)))
    assert len(found) == 1
    assert text in found[0].message
    assert ENGINE.validate(context(models=(ServedModel("m", "a", options={"context_length": 1}),))) == []


# -- server_main --------------------------------------------------------------------------------------------------------

LMS = """\
import json, os, signal, subprocess, sys, time
home, fake, words = {home!r}, {fake!r}, sys.argv[1:]
with open(os.path.join(home, "calls"), "a") as calls:
    calls.write(json.dumps(words) + "\\n")
pid_file = os.path.join(home, "pid")
if words[:2] == ["daemon", "status"]:
    print(json.dumps({{"status": {daemon!r}}}))
elif words[:2] == ["server", "start"]:
    if {broken!r}:
        sys.exit("Error: no such runtime")
    port = words[words.index("--port") + 1]
    argv = [sys.executable, fake, "--api", "lmstudio", "--port", port]
    with open(os.path.join(home, "server.log"), "wb") as log:
        server = subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True)
    open(pid_file, "w").write(str(server.pid))
    import socket
    for _ in range(500):
        try:
            socket.create_connection(("127.0.0.1", int(port)), 1).close()
            break
        except OSError:
            time.sleep(0.01)
elif words[:2] == ["server", "stop"] and os.path.exists(pid_file):
    pid = int(open(pid_file).read())
    os.kill(pid, signal.SIGTERM)
    os.remove(pid_file)
    print("Stopped the server")
"""


def child(tmp_path: Path, port: int, *, daemon: str = "running", broken: bool = False) -> subprocess.Popen[bytes]:
    lms = tmp_path / "lms.py"
    lms.write_text(LMS.format(home=str(tmp_path), fake=str(FAKE), daemon=daemon, broken=broken))
    argv = list(ENGINE.launch(context(port=port, command=(sys.executable, str(lms)))).argv)
    assert argv[:3] == [sys.executable, "-I", str(CHILD)]
    with (tmp_path / "child.log").open("wb") as log:
        return subprocess.Popen(argv, stdout=log, stderr=log, stdin=subprocess.DEVNULL)


def answers(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def calls(tmp_path: Path) -> list[list[str]]:
    return [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]


@pytest.mark.parametrize(("daemon", "down"), [("running", False), ("stopped", True)])
def test_server_main_starts_and_stops_the_server(tmp_path: Path, daemon: str, down: bool) -> None:
    port = free_port()
    process = child(tmp_path, port, daemon=daemon)
    try:
        until(lambda: answers(port), (tmp_path / "child.log").read_text())
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, (tmp_path / "child.log").read_text()
    finally:
        process.kill()
        process.wait()
    until(lambda: not answers(port), "the server still listens")
    assert ["server", "start", "--port", str(port), "--bind", "127.0.0.1"] in calls(tmp_path)
    assert ["server", "stop"] in calls(tmp_path)
    assert (["daemon", "down"] in calls(tmp_path)) is down


def test_server_main_exits_when_the_server_is_gone(tmp_path: Path) -> None:
    port = free_port()
    process = child(tmp_path, port)
    try:
        until(lambda: (tmp_path / "pid").exists() and answers(port), "no server")
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
        (tmp_path / "pid").unlink()
        assert process.wait(30) == 1
    finally:
        process.kill()
        process.wait()
    lines = (tmp_path / "child.log").read_text().splitlines()
    assert any("no longer answers" in line for line in lines)
    assert ENGINE.classify_exit(1, None, lines).kind is ExitKind.CRASH


def test_server_main_failed_start_prints_the_reason(tmp_path: Path) -> None:
    process = child(tmp_path, free_port(), broken=True)
    assert process.wait(30) == 1
    text = (tmp_path / "child.log").read_text()
    assert "no such runtime" in text
    assert "Traceback" not in text


def test_server_main_without_command_is_a_usage_error() -> None:
    done = subprocess.run([sys.executable, "-I", str(CHILD), "--port", "1"], capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "the command of lms is missing" in done.stderr
    gone = subprocess.run(
        [sys.executable, "-I", str(CHILD), "--port", "1", "--", "/nowhere/lms"],
        capture_output=True,
        text=True,
        timeout=30,
    )
    assert gone.returncode == 1
    assert "cannot be started" in gone.stdout
    assert "Traceback" not in gone.stderr


def test_launch_finds_lms_or_fails_with_hint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fleetd.engines.lmstudio.engine.PLACES", ())
    with pytest.raises(EngineError, match="no program named lms") as caught:
        ENGINE.launch(context(env={"PATH": str(tmp_path)}))
    assert not caught.value.recoverable


@pytest.mark.parametrize(
    ("code", "signal_name", "lines", "kind"),
    [
        (0, None, [], ExitKind.EXPECTED),
        (1, None, ["address already in use: an LM Studio server answers"], ExitKind.PORT_IN_USE),
        (2, None, ["usage"], ExitKind.BAD_CONFIG),
        (None, "SIGKILL", [], ExitKind.CRASH),
        (None, None, [], ExitKind.UNKNOWN),
    ],
)
def test_classify_exit_reads_code_and_log(
    code: int | None, signal_name: str | None, lines: list[str], kind: ExitKind
) -> None:
    assert ENGINE.classify_exit(code, signal_name, lines).kind is kind
