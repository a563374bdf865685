"""Starts: what a child gets, what it does not get, and how a refusal reads."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import socket
import stat
import sys
from pathlib import Path

import pytest

from fleetd.errors import HostError
from fleetd.host.logs.exit_mark import exit_mark
from fleetd.host.process import spawn as spawn_module
from fleetd.host.types import LogPolicy
from fleetd.resolver.environment import inherited
from tests.support.host import POLITE, Exits, host_in, log_says, python, spawn
from tests.support.ports import free_port
from tests.support.waiting import alive
from tests.support.waiting import until_async as until

REPORT = """
import json, os, sys
print("report " + json.dumps({
    "env": dict(os.environ), "cwd": os.getcwd(), "sid": os.getsid(0), "pgid": os.getpgid(0), "pid": os.getpid(),
    "umask": os.umask(0), "nice": os.nice(0), "cpu": sorted(os.sched_getaffinity(0)), "uid": os.getuid(),
    "groups": os.getgroups(), "fds": sorted(map(int, os.listdir("/proc/self/fd")))[:-1],
    "stdin": os.readlink("/proc/self/fd/0"),
    "nofile": __import__("resource").getrlimit(__import__("resource").RLIMIT_NOFILE)[0]}), flush=True)
"""


def report(tmp_path: Path, **fields: object) -> dict[str, object]:
    async def run() -> dict[str, object]:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(REPORT), exits, **fields)
            ended = await exits.next()
            lines = [line.text for line in await host.logs.run_tail(handle)]
            assert ended.code == 0, lines
            await host.sweep(handle)
            return json.loads(next(line for line in lines if line.startswith("report "))[7:])  # type: ignore[no-any-return]

    return asyncio.run(run())


def test_child_leads_session_and_inherits_no_descriptor(tmp_path: Path) -> None:
    seen = report(tmp_path, name="web", generation=7)
    assert seen["sid"] == seen["pgid"] == seen["pid"]
    assert seen["fds"] == [0, 1, 2]
    assert seen["stdin"] == "/dev/null"
    env = seen["env"]
    assert isinstance(env, dict)
    assert env["FLEETD_INSTANCE"] == "web:7"
    assert len(env["FLEETD_SPAWN"]) == 16


def test_what_is_the_daemons_stays_with_the_daemon(tmp_path: Path) -> None:
    outer = {
        "NOTIFY_SOCKET": "/x", "WATCHDOG_USEC": "1", "WATCHDOG_PID": "1", "LISTEN_FDS": "1", "LISTEN_PID": "1",
        "LISTEN_FDNAMES": "x", "FLEETD_INSTANCE": "outer:1", "FLEETD_SPAWN": "outer", "HOME": "/h", "PATH": os.environ["PATH"],
    }  # fmt: skip
    assert inherited(outer) == {"HOME": "/h", "PATH": os.environ["PATH"]}
    env = report(tmp_path, env={**outer, "FLEETD_REPLICA": "2"})["env"]
    assert isinstance(env, dict)
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID", "LISTEN_FDS", "LISTEN_PID", "LISTEN_FDNAMES"} & set(
        env
    )
    assert env["FLEETD_INSTANCE"] == "child:1"
    assert env["FLEETD_REPLICA"] == "2"


def test_settings_of_the_operating_system(tmp_path: Path) -> None:
    cpu = min(os.sched_getaffinity(0))
    seen = report(tmp_path, cwd=str(tmp_path), umask=0o027, nice=5, cpu=(cpu,), nofile=123)
    assert (seen["cwd"], seen["umask"], seen["cpu"], seen["nofile"]) == (str(tmp_path), 0o027, [cpu], 123)
    assert seen["nice"] == 5  # as it is written, whatever the daemon's own
    assert os.sched_getaffinity(0) >= {cpu}  # the daemon itself is as it was
    assert seen["uid"] == os.getuid()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start a process as somebody else")
def test_another_user_gets_its_groups_and_home(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    argv = ("/bin/sh", "-c", 'echo "who $(id -u) $HOME $USER"')

    async def run() -> str:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, argv, exits, user="nobody")
            await exits.next()
            await host.sweep(handle)
            return (await host.logs.run_tail(handle))[-1].text

    import pwd

    entry = pwd.getpwnam("nobody")
    assert asyncio.run(run()) == f"who {entry.pw_uid} {entry.pw_dir} {entry.pw_name}"


def make_file(path: Path, text: str, mode: int) -> str:
    path.write_text(text)
    path.chmod(mode)
    return str(path)


REFUSED = {
    "not on PATH": (lambda _: {"argv": ("no-such-program-anywhere",)}, "not found on PATH", False),
    "no such file": (lambda t: {"argv": (str(t / "none"),)}, "does not exist", False),
    "not executable": (lambda t: {"argv": (make_file(t / "plain", "x", 0o644),)}, "is not executable", False),
    "a directory": (lambda t: {"argv": (str(t),)}, "is a directory", False),
    "no interpreter": (lambda t: {"argv": (make_file(t / "s", "#!/none/sh\n", 0o755),)}, "interpreter", False),
    "no program": (
        lambda t: {"argv": (make_file(t / "b", "\0\1\2garbage", 0o755),)},
        "cannot run on this machine",
        False,
    ),
    "cwd missing": (lambda t: {"argv": ("true",), "cwd": str(t / "none")}, "working directory", False),
    "cwd a file": (lambda t: {"argv": ("true",), "cwd": make_file(t / "f", "", 0o644)}, "not a directory", False),
    "no such user": (lambda _: {"argv": ("true",), "user": "no-such-user"}, "no user", False),
    "empty": (lambda _: {"argv": ()}, "empty", False),
    "NUL": (lambda _: {"argv": ("true", "a\0b")}, "NUL", False),
    "bad variable": (
        lambda _: {"argv": ("true",), "env": {"A=B": "1", "PATH": os.environ["PATH"]}},
        "environment variable",
        False,
    ),
    "too long": (lambda _: {"argv": ("true", "x" * 3_000_000)}, "longer than the kernel allows", False),
    "no such CPU": (lambda _: {"argv": ("true",), "cpu": (4000,)}, "cannot run on CPUs", False),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refusals_are_sentences(case: str, tmp_path: Path) -> None:
    make, words, recoverable = REFUSED[case]

    async def run() -> HostError:
        async with host_in(tmp_path / "host") as host:
            fields = make(tmp_path)
            with pytest.raises(HostError) as caught:
                await spawn(host, fields.pop("argv"), **fields)
            assert not list(host.paths.handles.glob("*.json"))
            return caught.value

    error = asyncio.run(run())
    assert words in str(error)
    assert error.recoverable is recoverable


@pytest.mark.parametrize("code", [errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_a_machine_that_is_full_is_worth_another_try(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_args: object, **_fields: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(spawn_module.subprocess, "Popen", full)

    async def run() -> HostError:
        async with host_in(tmp_path) as host:
            with pytest.raises(HostError) as caught:
                await spawn(host, ("/bin/true",))
            return caught.value

    error = asyncio.run(run())
    assert error.recoverable
    assert os.strerror(code) in str(error)


def test_a_log_path_that_is_a_directory(tmp_path: Path) -> None:
    (tmp_path / "logs" / "child.log").mkdir(parents=True)

    async def run() -> None:
        async with host_in(tmp_path) as host:
            with pytest.raises(HostError, match="is a directory"):
                await spawn(host, ("/bin/true",))

    asyncio.run(run())


def test_a_log_path_that_is_a_pipe_does_not_hang(tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    os.mkfifo(tmp_path / "logs" / "child.log")

    async def run() -> None:
        async with host_in(tmp_path) as host:
            async with asyncio.timeout(5):
                with pytest.raises(HostError, match=r"regular file|cannot be written"):
                    await spawn(host, ("/bin/true",))

    asyncio.run(run())


@pytest.mark.parametrize(
    ("bound", "asked"), [("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("127.0.0.1", "0.0.0.0")]
)
def test_taken_port_names_its_owner(bound: str, asked: str, tmp_path: Path) -> None:
    async def run() -> str:
        with socket.socket() as listener:
            listener.bind((bound, 0))
            listener.listen()
            async with host_in(tmp_path) as host:
                with pytest.raises(HostError) as caught:
                    await spawn(host, ("/bin/true",), host=asked, port=listener.getsockname()[1])
                assert caught.value.recoverable
                return str(caught.value)

    text = asyncio.run(run())
    assert f"pid {os.getpid()} (" in text
    assert Path(sys.argv[0]).name in text or "py" in text


def test_a_closed_connection_does_not_keep_a_port_taken(tmp_path: Path) -> None:
    port = free_port()
    serve_once = """
        import socket, sys
        s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        s.bind(("127.0.0.1", int(sys.argv[1]))); s.listen(); print("up", flush=True)
        c, _ = s.accept(); c.sendall(b"x"); c.close()
    """

    async def run() -> None:
        async with host_in(tmp_path) as host:
            for generation in (1, 2):  # the first server's side is in TIME_WAIT when the second one starts
                exits = Exits()
                handle = await spawn(host, python(serve_once, str(port)), exits, port=port, generation=generation)
                await until(lambda g=generation: (tmp_path / "logs" / "child.log").read_text().count("up\n") == g)
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                assert await reader.read() == b"x"
                writer.close()
                assert (await exits.next()).code == 0
                assert await host.sweep(handle) == ()

    asyncio.run(run())


NAMES = [
    "plain",
    "a/b",
    "../up",
    "with space",
    "ünï-код",
    "a+b",
    ".hidden",
    "%41",
    "x" * 300,
    "-rf",
    "new\nline",
    "CON",
]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names_work_and_stay_in_their_folders(name: str, tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, ("/bin/echo", "hello"), exits, name=name)
            ended = await exits.next()
            assert await host.sweep(handle) == ()
            assert [line.text for line in await host.logs.tail(name)] == ["hello", exit_mark(ended)]

    asyncio.run(run())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["logs", "state"]
    assert len(list((tmp_path / "logs").iterdir())) == 1


def test_names_never_collide(tmp_path: Path) -> None:
    from fleetd.host.filenames import escape, unescape

    names = [*NAMES, "A", "a", "a%2Fb", "a%2fb", "x" * 301, ""]
    assert len({escape(name) for name in names}) == len(names)
    assert all(unescape(escape(name)) == name for name in names if len(name) < 100)


def test_start_with_cancelled_caller_is_undone(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            task = asyncio.ensure_future(spawn(host, ("sleep", "60"), name="gone"))
            await asyncio.sleep(0)  # let it reach its thread
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

            def left() -> bool:
                marked = (
                    b"FLEETD_INSTANCE=gone:1" in (host.table.environment(p) or b"") for p in host.table.snapshot()
                )
                return bool(list(host.paths.handles.glob("*.json"))) or any(marked)

            await until(lambda: not left(), "neither record nor process")

    asyncio.run(run())


def test_node_channel_ready_and_shutdown(tmp_path: Path) -> None:
    child = """
        import json, os, socket
        s = socket.socket(fileno=int(os.environ["NODE_CHANNEL_FD"]))
        s.sendall(b'garbage\\n{"cmd": 1}\\n"rea'); s.sendall(b'dy"\\n')
        message = json.loads(s.recv(100).split(b"\\n")[0])
        print("got", message, flush=True)
        raise SystemExit(7 if message == "shutdown" else 1)
    """

    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, python(child), exits, ipc=True)
            channel = handle.channel
            assert channel is not None
            await until(lambda: "ready" in channel.received, "the child sent its message")
            from dataclasses import replace

            assert await host.stop(handle, replace(POLITE, message="shutdown")) == ()
            assert exits.seen[0].code == 7
            await log_says(host, handle, "got shutdown")

    asyncio.run(run())


def test_pipe_capture_is_a_choice_of_the_request(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            exits = Exits()
            handle = await spawn(host, ("/bin/sh", "-c", "echo a; printf b >&2"), exits, logs=LogPolicy(capture="pipe"))
            ended = await exits.next()
            await host.sweep(handle)
            lines = await host.logs.tail("child")
            assert [line.text for line in lines] == ["a", "b", exit_mark(ended)]
            assert all(line.at is not None and abs(line.at - ended.at) < 10 for line in lines)
            for raw in (tmp_path / "logs" / "child.log").read_text().splitlines():
                assert set(json.loads(raw)) == {"t", "line"}

    asyncio.run(run())


def test_records_are_private(tmp_path: Path) -> None:
    async def run() -> None:
        async with host_in(tmp_path) as host:
            handle = await spawn(host, ("sleep", "60"))
            (path,) = host.paths.handles.glob("*.json")
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
            assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
            assert json.loads(path.read_text())["pid"] == handle.pid
            assert await host.stop(handle, POLITE) == ()
            assert not path.exists()
            assert not alive(handle.pid)

    asyncio.run(run())
