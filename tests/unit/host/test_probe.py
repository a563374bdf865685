"""Probes against real listeners, programs and logs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from fleetd.core.data.specs import ProbeKind, ProbeSpec
from fleetd.host.host import Host
from fleetd.host.probe import Answer, Prober, Target, ask_http, ask_tcp
from fleetd.host.types import LogPolicy, Program
from fleetd.resolver.environment import inherited
from tests.support.host import DEADLINE_S, POLITE, host_in, log_says, paths_in, python, spawn
from tests.support.ports import free_port
from tests.support.waiting import alive
from tests.support.waiting import until_async as until

READY = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
LOADING = b'HTTP/1.1 503 Service Unavailable\r\nContent-Length: 19\r\n\r\n{"error": "loading"}'


@asynccontextmanager
async def server(answer: bytes | None, seen: list[bytes] | None = None) -> AsyncIterator[int]:
    """A listener with one answer; None never answers."""
    open_writers: list[asyncio.StreamWriter] = []

    async def talk(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        open_writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            head = await reader.readuntil(b"\r\n\r\n")
            if seen is not None:
                seen.append(head)
            if answer is None:
                await reader.read()
            else:
                writer.write(answer)
                await writer.drain()
        writer.close()

    listener = await asyncio.start_server(talk, "127.0.0.1", 0)
    try:
        yield listener.sockets[0].getsockname()[1]
    finally:
        listener.close()
        for writer in open_writers:
            writer.close()
        await listener.wait_closed()


HTTP = [
    (READY, True, "200"),
    (LOADING, False, 'GET /health: 503 Service Unavailable: {"error": "loading"}'),
    (b"HTTP/1.1 302 Found\r\n\r\n", True, "302"),
    (b"HTTP/1.1 404\r\n\r\n", False, "GET /health: 404"),
    (b"SSH-2.0-OpenSSH\r\n\r\n", False, "GET /health: no HTTP answer"),
    (b"", False, "GET /health: no HTTP answer (IncompleteReadError)"),
    (b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100_000, False, "GET /health: no HTTP answer (LimitOverrunError)"),
    (b"\0\xff\x80garbage\r\n\r\n", False, "GET /health: no HTTP answer"),
    (b"HTTP/1.1 500 \xff\r\n\r\n\xff\xfe", False, "GET /health: 500"),
]


@pytest.mark.parametrize(("answer", "ok", "detail"), HTTP)
def test_http(answer: bytes, ok: bool, detail: str) -> None:
    async def run() -> tuple[Answer, list[bytes]]:
        seen: list[bytes] = []
        async with server(answer, seen) as port:
            target = Target("web", 1, port=port, headers={"Authorization": "Bearer x"})
            return await ask_http("/health", target), seen

    result, (head,) = asyncio.run(run())
    assert result.ok is ok
    assert result.detail.startswith(detail), result.detail
    assert head.startswith(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"Authorization: Bearer x\r\n" in head


def test_nobody_listens() -> None:
    async def run() -> None:
        target = Target("web", 1, port=free_port())
        for answer in (await ask_http("/", target), await ask_tcp(target)):
            assert answer == Answer(False, f"connection refused on port {target.port}")
        assert (await ask_tcp(Target("web", 1))).detail == "there is no port to connect to"
        assert (await ask_http("/", Target("web", 1))).detail == "there is no port to ask"
        async with server(READY) as port:
            assert (await ask_http(f"http://127.0.0.1:{port}/x?y=1", Target("web", 1))).ok
            assert (await ask_tcp(Target("web", 1, port=port))).ok

    asyncio.run(run())


class Answers:
    def __init__(self) -> None:
        self.seen: list[Answer] = []
        self.times: list[float] = []

    def __call__(self, answer: Answer) -> None:
        self.seen.append(answer)
        self.times.append(time.monotonic())


@asynccontextmanager
async def probing(
    host: object, target: Target, spec: ProbeSpec, kind: ProbeKind = ProbeKind.READINESS, completion: object = None
) -> AsyncIterator[Answers]:
    answers = Answers()
    prober = Prober(host, target, kind, spec, answers, completion)  # type: ignore[arg-type]
    try:
        yield answers
    finally:
        prober.close()
        await prober.wait_closed()


def test_a_timeout_is_a_failure_and_asks_go_one_after_another(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host, server(None) as port:
            spec = ProbeSpec(http="/", period_s=0.02, timeout_s=0.1)
            async with probing(host, Target("web", 1, port=port), spec) as answers:
                await until(lambda: len(answers.seen) >= 3)
            assert answers.seen[0] == Answer(False, "no answer within 0.1 s")
            gaps = [b - a for a, b in zip(answers.times, answers.times[1:], strict=False)]
            assert all(gap >= 0.099 for gap in gaps)

    asyncio.run(run())


def test_closing_ends_it(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host, server(READY) as port:
            spec = ProbeSpec(http="/", period_s=0.001)
            async with probing(host, Target("web", 1, port=port), spec) as answers:
                await until(lambda: answers.seen)
            count = len(answers.seen)
            await asyncio.sleep(0.02)
            assert len(answers.seen) == count

    asyncio.run(run())


SERVE = """
    import os, socket, sys, time
    time.sleep(float(sys.argv[2]))
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen()
    print("listening", time.monotonic(), flush=True)
    while True:
        c, _ = s.accept(); c.recv(4096); c.sendall(b"HTTP/1.1 200 OK\\r\\n\\r\\n"); c.close()
"""


def test_a_startup_probe_sees_a_server_within_milliseconds(tmp_path: Path) -> None:
    async def run(folder: Path) -> float:
        port, spec = free_port(), ProbeSpec(http="/", period_s=5.0)
        async with host_in(folder) as host:
            handle = await spawn(host, python(SERVE, str(port), "0.1"), port=port)
            target = Target("child", 1, port=port, handle=handle)
            async with probing(host, target, spec, ProbeKind.STARTUP) as answers:
                await until(lambda: answers.seen and answers.seen[-1].ok, "the first success")
                up = answers.times[-1]
                assert len(answers.seen) <= 3  # refused, perhaps once more, then well: not one per try
            (line,) = [text for text in await log_says(host, handle, "listening") if "listening" in text]
            await host.stop(handle, POLITE)
            return up - float(line.split()[1])

    assert min(asyncio.run(run(tmp_path / str(number))) for number in range(3)) < 0.2  # typically 15 ms


def test_another_server_on_our_port_is_no_success(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host, server(READY) as port:
            handle = await spawn(host, ("sleep", "600"))
            spec, target = ProbeSpec(http="/", period_s=0.05), Target("child", 1, port=port, handle=handle)
            async with probing(host, target, spec, ProbeKind.STARTUP) as answers:
                await until(lambda: len(answers.seen) >= 2)
            assert not any(answer.ok for answer in answers.seen)
            assert answers.seen[-1].detail.startswith(f"port {port} is answered by pid {__import__('os').getpid()} (")
            async with probing(host, replace(target, own_listener=False), spec, ProbeKind.STARTUP) as answers:
                await until(lambda: answers.seen)
            assert answers.seen[0].ok
            await host.stop(handle, POLITE)

    asyncio.run(run())


EXEC: list[tuple[tuple[str, ...], bool, str]] = [
    (("/bin/sh", "-c", "echo fine"), True, "fine"),
    (("/bin/sh", "-c", "echo broken >&2; exit 4"), False, "/bin/sh: exit code 4: broken"),
    (("/bin/sh", "-c", "kill -9 $$"), False, "/bin/sh: SIGKILL"),
    (("no-such-check",), False, "program 'no-such-check' not found"),
    (("/bin/sh", "-c", "exec >/dev/null 2>&1; yes"), False, "/bin/sh was killed after 0.5 s"),
    (("/bin/sh", "-c", "yes"), False, "/bin/sh was killed after 0.5 s"),
]


@pytest.mark.parametrize(("argv", "ok", "detail"), EXEC)
def test_exec(argv: tuple[str, ...], ok: bool, detail: str, tmp_path: Path) -> None:
    async def run() -> Answer:
        async with host_in(tmp_path) as host:
            spec = ProbeSpec(exec=argv, period_s=60, timeout_s=0.5)
            async with probing(host, Target("web", 1, env=inherited(os.environ)), spec) as answers:
                await until(lambda: answers.seen)
            return answers.seen[0]

    answer = asyncio.run(run())
    assert answer.ok is ok
    assert answer.detail.startswith(detail), answer.detail


async def until_dead(note: Path, count: int) -> None:
    pids = [int(word) for word in note.read_text().split()]
    assert len(pids) == count
    await until(lambda: not any(alive(pid) for pid in pids), "both dead")


def test_exec_left_by_dead_daemon_is_killed_by_next_daemon(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = f"(setsid sh -c 'echo $$ >> {note}; exec sleep 600' &) ; echo $$ >> {note}; sleep 600"

    async def run() -> None:
        killed = Host(paths_in(tmp_path))  # one that was killed: it neither ends nor closes anything
        program = Program(argv=("/bin/sh", "-c", script), env=inherited(os.environ))
        asking = asyncio.ensure_future(killed.probe_command(program, 600))
        await until(lambda: note.exists() and len(note.read_text().split()) == 2, "both there")
        async with host_in(tmp_path / "elsewhere"):
            assert all(psutil.pid_exists(int(pid)) for pid in note.read_text().split())
        async with host_in(tmp_path):
            await until_dead(note, 2)
            await asyncio.wait_for(asking, DEADLINE_S)

    asyncio.run(run())


def test_an_exec_that_hangs_is_killed_with_its_family(tmp_path: Path) -> None:
    note = tmp_path / "pids"
    script = f"(setsid sh -c 'echo $$ >> {note}; exec sleep 600' &) ; echo $$ >> {note}; sleep 600"

    async def run() -> None:
        async with host_in(tmp_path) as host:
            spec = ProbeSpec(exec=("/bin/sh", "-c", script), period_s=60, timeout_s=0.5)
            async with probing(host, Target("web", 1, env=inherited(os.environ)), spec) as answers:
                await until(lambda: answers.seen)
                assert not answers.seen[0].ok
            await until_dead(note, 2)
            note.unlink()
            async with probing(
                host, Target("web", 1, env=inherited(os.environ)), replace(spec, timeout_s=60)
            ) as answers:
                await until(lambda: note.exists() and len(note.read_text().split()) == 2, "both there")
            await until_dead(note, 2)  # closed in the middle
            assert answers.seen == []

    asyncio.run(run())


@pytest.mark.parametrize("capture", ["file", "pipe"])
def test_log_line_counts_this_run_only(capture: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            policy = LogPolicy(capture=capture)
            first = await spawn(host, ("/bin/echo", "Server is ready"), logs=policy)
            await first.exited.wait()
            await host.sweep(first)
            script = "echo Server starts; read x < $0; echo Server is ready; sleep 600"
            fifo = tmp_path / "go"
            __import__("os").mkfifo(fifo)
            second = await spawn(host, ("/bin/sh", "-c", script, str(fifo)), generation=2, logs=policy)
            spec = ProbeSpec(log_line=r"^Server is read[yY]$", period_s=0.01)
            target = Target("child", 2, handle=second)
            async with probing(host, target, spec, ProbeKind.STARTUP) as answers:
                await until(lambda: answers.seen)
                await log_says(host, second, "starts")
                assert not answers.seen[-1].ok
                await asyncio.to_thread(fifo.write_text, "go\n")
                await until(lambda: answers.seen[-1].ok, "the line")
                assert answers.seen[-1].detail == "Server is ready"
            await host.stop(second, POLITE)

    asyncio.run(run())


def test_a_wrong_expression_is_an_answer(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, ("sleep", "600"))
            async with probing(host, Target("child", 1, handle=handle), ProbeSpec(log_line="(")) as answers:
                await until(lambda: answers.seen)
            assert "not a regular expression" in answers.seen[0].detail
            await host.stop(handle, POLITE)

    asyncio.run(run())


def test_completion_is_asked_of_the_engine(tmp_path: Path) -> None:
    async def ask(timeout_s: float) -> Answer:
        return Answer(timeout_s == 3.0, "one token")

    async def run() -> None:
        async with host_in(tmp_path) as host:
            async with probing(
                host, Target("m", 1), ProbeSpec(completion=True, timeout_s=3.0), completion=ask
            ) as answers:
                await until(lambda: answers.seen)
            assert answers.seen[0] == Answer(True, "one token")

    asyncio.run(run())
