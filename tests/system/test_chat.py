"""`fleetctl chat` with real llama.cpp: once, in pipes, and as a conversation on a terminal."""

from __future__ import annotations

import importlib.util
import os
import pty
import select
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from bench.tiny_gguf import write
from tests.support.cli import FLEETCTL, environment, fleetctl
from tests.support.daemon import Fleetd, fleetd

pytestmark = [
    pytest.mark.real_engine,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None and shutil.which("llama-server") is None,
        reason="llamacpp is not installed",
    ),
]
OPTIONS = "{model: ./a.gguf, context_length: 4096, parallel: 1, threads: 1}"
FLEET = (
    "devices: {host: {budget: 500MiB}}\n"
    f"models: {{a: {{engine: llamacpp, options: {OPTIONS}, pin: true, aliases: [tiny]}}, gone: {{engine: llamacpp, "
    "options: {model: ./gone.gguf}}}\n"
)


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleetd]:
    folder = tmp_path_factory.mktemp("chat")
    write(folder / "a.gguf", seed=1)
    with fleetd(folder, FLEET) as started:
        started.start()
        assert started.chat("a").status == 200  # the engine is no child of a single test
        yield started


def socket_of(daemon: Fleetd) -> str:
    return str(daemon.run / "fleetd.sock")


def test_chat_answers_once_with_the_answer_alone(daemon: Fleetd) -> None:
    ran = fleetctl("chat", "tiny", "hello", "there", "--max-tokens", "8", FLEETD_SOCKET=socket_of(daemon))
    assert ran.code == 0, ran.err
    assert ran.out.endswith("\n")
    assert ran.err == "", "into a pipe nothing but the answer"


def test_run_reads_standard_input(daemon: Fleetd) -> None:
    ran = fleetctl("run", "a", "--max-tokens", "4", stdin="some text", FLEETD_SOCKET=socket_of(daemon))
    assert (ran.code, ran.err) == (0, "")
    nothing = fleetctl("chat", "a", stdin="", FLEETD_SOCKET=socket_of(daemon))
    assert nothing.code == 2
    assert "nothing to ask" in nothing.err


@pytest.mark.parametrize(
    ("model", "code", "words"),
    [("nope", 4, "known: a"), ("tinny", 4, "did you mean tiny?"), ("gone", 1, "gone.gguf")],
)
def test_chat_failure_names_the_cause(daemon: Fleetd, model: str, code: int, words: str) -> None:
    ran = fleetctl("chat", model, "hi", FLEETD_SOCKET=socket_of(daemon))
    assert (ran.code, ran.out) == (code, "")
    assert words in ran.err


@contextmanager
def conversation(daemon: Fleetd, *options: str) -> Iterator[tuple[int, subprocess.Popen[bytes]]]:
    """Run a chat on a terminal; yield the terminal and the program."""
    master, slave = pty.openpty()
    env = environment(TERM="xterm", FLEETD_SOCKET=socket_of(daemon))
    started = subprocess.Popen(
        [*FLEETCTL, "chat", "a", *options], stdin=slave, stdout=slave, stderr=slave, env=env, start_new_session=True
    )
    os.close(slave)
    try:
        yield master, started
    finally:
        if started.poll() is None:
            started.kill()
        started.wait()
        os.close(master)


def read_until(master: int, text: str, limit_s: float = 30.0) -> str:
    """Read the terminal until it shows the text."""
    seen, deadline = b"", time.monotonic() + limit_s
    while text.encode() not in seen:
        assert time.monotonic() < deadline, seen
        if select.select([master], [], [], 0.1)[0]:
            seen += os.read(master, 65536)
    return seen.decode("utf-8", "replace")


def test_interrupt_stops_the_answer_and_not_the_chat(daemon: Fleetd) -> None:
    with conversation(daemon) as (master, started):
        read_until(master, ">>> ")
        os.write(master, b"tell me a long story\n")
        read_until(master, "story\r\n")
        started.send_signal(signal.SIGINT)
        read_until(master, ">>> ")
        os.write(master, b"/help\n")
        read_until(master, "/bye")
        os.write(master, b"and now\n")
        read_until(master, "first after")
        os.write(master, b"/bye\n")
        assert started.wait(30) == 0


def test_chat_loads_a_model_that_is_not_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "a.gguf", seed=1)
    with fleetd(tmp_path, FLEET) as daemon:
        daemon.start()
        ran = fleetctl("chat", "a", "hi", "--max-tokens", "3", FLEETD_SOCKET=socket_of(daemon))
        assert ran.code == 0, ran.err
        assert daemon.status()["models"][0]["loads"] == 1
