"""Every key of a service has its effect on the running process or the daemon."""

from __future__ import annotations

import contextlib
import gzip
import json
import os
import random
import re
import signal
import socket
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.support.daemon import Fleetd, fake, fleetd
from tests.support.fleet_files import (
    QUICK,
    SLEEPER,
    alive,
    all_lines,
    crash,
    ctl,
    fleet,
    order,
    piped_lines,
    python,
    ready,
    sh,
    until_logged,
)
from tests.support.ports import free_port
from tests.support.waiting import until

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root may start a process as somebody else")


def story(daemon: Fleetd, name: str) -> str:
    return json.dumps(daemon.control("GET", f"/v1/story/{name}").json, ensure_ascii=False)


def started(folder: Path, service: dict[str, Any], **keys: Any) -> Fleetd:
    return fleetd(folder, fleet({"a": service}, **keys))


def test_service_command_args_cwd_env_and_placeholders(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / ".env").write_text("FROM_FILE='a b'\nBOTH=file\n")
    code = (
        "import json, os, sys, time\n"
        "print(json.dumps([sys.argv[1:], os.getcwd(), dict(os.environ)]), flush=True)\ntime.sleep(1000)"
    )
    service = {
        "command": python(code, "one two"), "args": ["--port", "{port}", "{name}", "{other}"], "cwd": "work", "env_file": ".env",
        "env": {"BOTH": "env", "URL": "http://{host}:{port}"}, "port": free_port(),
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        ready(daemon, "a")
        values = json.loads(until_logged(daemon, "a", "\n").splitlines()[0])
        port = str(service["port"])
        assert values[0] == ["one two", "--port", port, "a", "{other}"]
        assert values[1] == str(tmp_path / "work")
        env = values[2]
        assert (env["FROM_FILE"], env["BOTH"], env["URL"]) == ("a b", "env", f"http://127.0.0.1:{port}")
        assert (env["PORT"], env["FLEETD_NAME"]) == (port, "a")


def test_command_string_is_split_like_a_shell_without_one(tmp_path: Path) -> None:
    text = f"{sys.executable} -I -c 'import sys, time; print(sys.argv[1:], flush=True); time.sleep(1000)' \"a b\" c;d $HOME"
    with started(tmp_path, {"command": text.replace("$", "$$")}) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert "['a b', 'c;d', '$HOME']" in until_logged(daemon, "a", "]")


def free_run(count: int) -> int:
    """Return the first of `count` consecutive free ports, below the ephemeral range."""
    first = random.Random().randrange(15000, 19000)
    while True:
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                first += count
                continue
            return first


def test_replicas_get_numbers_and_ports(tmp_path: Path) -> None:
    port = free_run(3)
    with started(
        tmp_path, {"command": sh("echo $FLEETD_REPLICA $PORT; exec sleep 1000"), "replicas": 3, "port": port}
    ) as daemon:
        daemon.start()
        for number in (1, 2, 3):
            ready(daemon, f"a-{number}")
            until_logged(daemon, f"a-{number}", f"{number} {port + number - 1}")
            assert daemon.process_row(f"a-{number}")["port"] == port + number - 1


def test_requires_blocks_then_resumes_without_crash_loop(tmp_path: Path) -> None:
    """Supervisor 14, with a folder instead of a volume."""
    with started(
        tmp_path, {"command": sh("test -e volume/model && exec sleep 1000"), "requires": ["volume"]}
    ) as daemon:
        daemon.start()
        row = daemon.until_state("a", "BLOCKED")
        assert "volume" in row["reason"]
        assert daemon.get("/ready").status == 503
        (tmp_path / "volume.part").mkdir()
        (tmp_path / "volume.part" / "model").touch()
        (tmp_path / "volume.part").rename(tmp_path / "volume")
        pid = ready(daemon, "a")
        assert daemon.process_row("a")["generation"] == 1
        (tmp_path / "volume").rename(tmp_path / "away")
        os.kill(pid, signal.SIGKILL)
        daemon.until_state("a", "BLOCKED")
        assert daemon.process_row("a")["generation"] <= 2, (
            "looked at before a start: no program is started into nothing"
        )
        (tmp_path / "away").rename(tmp_path / "volume")
        ready(daemon, "a")


def test_stop_command_gets_the_pid(tmp_path: Path) -> None:
    stop = ["sh", "-c", "echo asked; kill -USR1 $MAINPID"]
    code = "trap 'echo by the command; exit 0' USR1; trap 'echo by the signal' TERM; echo up; while true; do sleep 0.02; done"
    with started(tmp_path, {"command": sh(code), "stop": {"command": stop, "timeout": "10s"}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "up")
        assert order(daemon, "stop", "a").status == 200
        assert "by the command" in daemon.log_of("a")
        assert "by the signal" not in daemon.log_of("a")


def test_failing_stop_command_falls_back_to_the_signal(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "stop": {"command": ["false"], "timeout": "20s"}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        began = time.monotonic()
        assert order(daemon, "stop", "a").status == 200
        assert time.monotonic() - began < 10
        assert daemon.process_row("a")["last_exit"]["signal"] == "SIGTERM"


STOP_COMMANDS = [
    (
        sh("echo first; echo no such unit >&2; exit 3"),
        "its stop.command failed: exit code 3: no such unit; the signal was sent",
    ),
    (["no-such-program"], "its stop.command failed: program 'no-such-program' not found"),
    (sh("sleep 1000"), "its stop.command failed: it did not exit within "),
    (sh("echo done; kill $MAINPID"), "its stop.command succeeded after "),
]


@pytest.mark.parametrize(("command", "report"), STOP_COMMANDS, ids=["fails", "missing", "hangs", "works"])
def test_stop_command_result_is_reported(tmp_path: Path, command: list[str], report: str) -> None:
    child = sh("trap 'sleep 1; exit 0' TERM; while true; do sleep 0.02; done") if "well" in report else SLEEPER
    timeout = "500ms" if "within" in report else "20s"
    with started(tmp_path, {"command": child, "stop": {"command": command, "timeout": timeout}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert order(daemon, "stop", "a").status == 200
        assert story(daemon, "a").count(report) == 1
        assert (report in daemon.log()) == ("failed" in report)


@pytest.mark.parametrize(("kill", "left"), [("set", 0), ("leader", 1)])
def test_stop_kill_scope_selects_the_processes(tmp_path: Path, kill: str, left: int) -> None:
    code = "import os, subprocess, time\nprint(subprocess.Popen(['sleep', '1000'], start_new_session=True).pid)\ntime.sleep(1000)"
    with started(tmp_path, {"command": python(code), "stop": {"kill": kill, "timeout": "500ms"}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        child = int(until_logged(daemon, "a", "\n").split()[0])
        assert order(daemon, "stop", "a").status == 200
        assert int(alive(child)) == left


@pytest.mark.parametrize("way", ["http", "tcp", "exec", "log_line"])
def test_every_probe_kind_gates_the_start(tmp_path: Path, way: str) -> None:
    probe: dict[str, Any] = {
        "http": {"http": "/health"},
        "tcp": {"tcp": True},
        "exec": {"exec": ["test", "-e", "ready"]},
        "log_line": {"log_line": "^serving on [0-9]+$"},
    }[way]
    code = (
        "import os, sys, time\nwhile not os.path.exists('go'): time.sleep(0.02)\n"
        "open('ready', 'w')\nprint('serving on', sys.argv[1])\n"
        "os.execv(sys.argv[2], [sys.argv[2], '-I', sys.argv[3], '--port', sys.argv[1]])"
    )
    from tests.support.daemon import FAKE

    service = {
        "command": python(code, "{port}", sys.executable, str(FAKE)), "port": free_port(),
        "probes": {"startup": {**probe, "period": "30ms"}},
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        row = daemon.until_state("a", "STARTING")
        until(
            lambda: "startup" in daemon.control("GET", "/v1/processes/a").json["probes"] or way == "log_line",
            "it is asked",
        )
        assert daemon.process_row("a")["state"] == "STARTING"
        (tmp_path / "go").touch()
        assert ready(daemon, "a") == row["pid"] or row["pid"] is None


def test_liveness_restarts_a_hung_process_and_counts_it(tmp_path: Path) -> None:
    service = {
        "command": json.loads(fake()), "restart": QUICK,
        "probes": {"startup": {"http": "/health"}, "liveness": {"http": "/health", "period": "100ms", "timeout": "300ms", "failures": 2}},
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        os.kill(pid, signal.SIGSTOP)
        until(lambda: daemon.process_row("a")["generation"] == 2, "it is restarted")
        assert "liveness probe failed 2 times" in story(daemon, "a")
        assert ready(daemon, "a") != pid
        assert not alive(pid)


def test_limits_umask_and_environment_reach_the_kernel(tmp_path: Path) -> None:
    code = (
        "import os, resource, time\nos.close(os.open('made', os.O_CREAT | os.O_WRONLY, 0o666))\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE)[0], os.nice(0), sorted(os.sched_getaffinity(0)), flush=True)\ntime.sleep(1000)"
    )
    core = max(os.sched_getaffinity(0))
    service = {
        "command": [sys.executable, "-I", "-u", "-c", code],
        "limits": {"nofile": 300, "nice": 7, "cpu": [core]},
        "umask": "0027",
    }
    with started(tmp_path, service) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert f"300 7 [{core}]" in until_logged(daemon, "a", "]")
        assert (tmp_path / "made").stat().st_mode & 0o777 == 0o640


@needs_root
def test_service_runs_as_its_user(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    for folder in tmp_path.parents:
        if str(folder).startswith("/tmp/pytest"):
            folder.chmod(0o755)
    service = {"command": ["sh", "-c", "id -un; echo $HOME; exec sleep 1000"], "user": "nobody", "cwd": "/"}
    with started(tmp_path, service) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        until_logged(daemon, "a", "nobody\n")
        assert psutil.Process(pid).username() == "nobody"
        assert daemon.stop() == 0


def test_unknown_user_is_one_clear_error(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "user": "no-such-user"}) as daemon:
        daemon.start()
        assert "no user 'no-such-user'" in daemon.until_state("a", "FAILED")["reason"]


def test_max_age_restart_counts_no_death(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "max_age": "1s"}) as daemon:
        daemon.start()
        before = daemon.until_state("a", "READY")
        until(lambda: daemon.process_row("a")["generation"] > before["generation"], "it is too old")
        assert ready(daemon, "a") != before["pid"]
        assert "older than 1 s" in story(daemon, "a")
        assert "BACKOFF" not in story(daemon, "a")


def test_schedule_restarts_running_but_not_stopped(tmp_path: Path) -> None:
    """The schedule fires every minute; the test waits for it."""
    every = {"schedule": {"restart": "* * * * *", "timezone": "Europe/Berlin"}}
    left_s = 60 - time.time() % 60
    services = {"a": {}, "b": {}, "c": {"replicas": 2}}
    with fleetd(
        tmp_path, fleet({name: {"command": SLEEPER, **every, **more} for name, more in services.items()})
    ) as daemon:
        daemon.start()
        ready(daemon, "a")
        ready(daemon, "b")
        generation = daemon.process_row("a")["generation"]
        assert order(daemon, "stop", "b").status == 200
        until(lambda: daemon.process_row("a")["generation"] > generation, "the minute is full", left_s + 75)
        assert "schedule * * * * *" in story(daemon, "a")
        assert daemon.process_row("b")["state"] == "STOPPED"
        for name in ("c-1", "c-2"):
            until(lambda name=name: "its turn to restart: schedule" in story(daemon, name), f"{name} has its turn")
            until(lambda name=name: daemon.process_row(name)["generation"] > generation, f"{name} is restarted")


test_schedule_restarts_running_but_not_stopped = pytest.mark.slow(test_schedule_restarts_running_but_not_stopped)


def test_hooks_run_before_and_after_in_the_process_env(tmp_path: Path) -> None:
    service = {
        "command": sh("cat made; exec sleep 1000"), "env": {"WORD": "hello"},
        "hooks": {"pre_start": sh("echo $WORD $FLEETD_NAME > made; echo one; echo two"), "post_stop": sh("rm made; echo over > over")},
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "hello a")
        assert order(daemon, "stop", "a").status == 200
        assert not (tmp_path / "made").exists()
        assert (tmp_path / "over").read_text() == "over\n"
        assert re.search(r"its pre_start hook succeeded after [0-9.]+ s: two", story(daemon, "a"))
        assert re.search(r"its post_stop hook succeeded after [0-9.]+ s: it printed nothing", story(daemon, "a"))


def test_case_35_failing_pre_start_aborts_and_counts_as_failure(tmp_path: Path) -> None:
    service = {
        "command": sh("echo started > started; exec sleep 1000"),
        "hooks": {"pre_start": sh("echo no database >&2; exit 1")},
        "restart": {**QUICK, "crash_loop": {"count": 3}},
    }
    with started(tmp_path, service) as daemon:
        daemon.start()
        row = daemon.until_state("a", "FAILED")
        assert row["generation"] == 3
        assert "its pre_start hook failed: no database" in row["reason"]
        assert not (tmp_path / "started").exists()


def test_stopped_process_has_no_pid_while_post_stop_runs(tmp_path: Path) -> None:
    hooks = {"post_stop": sh("touch hook; while test ! -e go_on; do sleep 0.02; done")}
    with started(tmp_path, {"command": SLEEPER, "hooks": hooks}) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert daemon.process_row("a")["pid"]
        order(daemon, "stop", "a", wait=False)
        until((tmp_path / "hook").exists, "the hook runs")
        row = daemon.process_row("a")
        assert row["state"] == "STOPPING"
        assert [row[key] for key in ("pid", "rss_bytes", "uptime_s", "cpu_percent")] == [None] * 4
        (tmp_path / "go_on").touch()
        daemon.until_state("a", "STOPPED")


def test_uptime_is_process_age_after_adoption_too(tmp_path: Path) -> None:
    service = {"command": SLEEPER, "hooks": {"pre_start": ["sleep", "2"]}}
    with started(tmp_path, service) as daemon:
        began = time.monotonic()
        daemon.start()
        row, seen = daemon.until_state("a", "READY"), time.monotonic()
        assert row["uptime_s"] < seen - began - 2, "without the hook"
        crash(daemon)
        daemon.start()
        again = daemon.until_state("a", "READY")
        assert again["pid"] == row["pid"]
        assert abs(again["uptime_s"] - row["uptime_s"] - (time.monotonic() - seen)) < 1


def test_case_35_failing_post_stop_changes_nothing(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "hooks": {"post_stop": sh("echo broken; exit 1")}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        assert order(daemon, "stop", "a").status == 200
        assert daemon.process_row("a")["state"] == "STOPPED"
        assert "its post_stop hook failed: broken" in story(daemon, "a")
        assert order(daemon, "start", "a").status == 200


def test_case_35_stop_interrupts_a_slow_pre_start(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "hooks": {"pre_start": sh("echo $$$$ > hook; sleep 1000")}}) as daemon:
        daemon.start()
        until(lambda: (tmp_path / "hook").exists() and (tmp_path / "hook").read_text().strip(), "the hook runs")
        pid = int((tmp_path / "hook").read_text())
        assert daemon.process_row("a")["state"] == "STARTING"
        began = time.monotonic()
        assert order(daemon, "stop", "a").status == 200
        assert time.monotonic() - began < 5
        assert daemon.process_row("a")["state"] == "STOPPED"
        until(lambda: not alive(pid), "the hook is gone")
        assert order(daemon, "start", "a", wait=False).status == 202
        daemon.until_state("a", "STARTING")
        assert daemon.stop() == 0
        assert daemon.children() == []


def test_forced_stop_does_not_wait_for_post_stop(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "hooks": {"post_stop": sh("touch hook; sleep 1000")}}) as daemon:
        daemon.start()
        ready(daemon, "a")
        daemon.signal(signal.SIGTERM)
        until((tmp_path / "hook").exists, "the hook runs")
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        until(lambda: daemon.children() == [], "nothing is left")


def test_enabled_false_starts_nothing_true_starts(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER, "enabled": False}) as daemon:
        daemon.start()
        row = daemon.until_state("a", "STOPPED")
        assert "disabled" in row["reason"]
        assert daemon.get("/ready").status == 200
        daemon.write(fleet({"a": {"command": SLEEPER}}))
        ready(daemon, "a")
        daemon.write(fleet({"a": {"command": SLEEPER, "enabled": False}}))
        daemon.until_state("a", "STOPPED")


def test_piped_logs_have_times_and_rotate(tmp_path: Path) -> None:
    service = {
        "command": python("import time\nfor n in range(4000): print('line', n, 'x' * 40)\ntime.sleep(1000)"),
        "logs": {"capture": "pipe", "max_size": "64KiB", "keep": 20, "compress": True},
    }
    with started(tmp_path, service) as daemon:
        daemon.start()
        ready(daemon, "a")
        until(lambda: any("line 3999 " in line for line in all_lines(tmp_path, "a")), "all is written")
        numbers = [int(line.split()[1]) for line in piped_lines(tmp_path, "a") if line.startswith("line ")]
        assert numbers == list(range(4000))
        until(lambda: list((tmp_path / "logs").glob("a.log.*.gz")), "archives are compressed")
        times: list[float] = []
        for path in (tmp_path / "logs").glob("a.log*"):
            with contextlib.suppress(OSError, EOFError):  # moved or archived at this moment
                content = path.read_bytes()
                rows = (gzip.decompress(content) if path.suffix == ".gz" else content).split(b"\n")
                times += [json.loads(row)["t"] for row in rows if row.startswith(b'{"t":') and row.endswith(b"}")]
        assert times
        assert all(abs(at - time.time()) < 120 for at in times)


@pytest.mark.parametrize("how", ["deleted", "replaced", "adopted"])
def test_deleted_log_of_a_running_process_is_reported(tmp_path: Path, how: str) -> None:
    loud = sh("n=0; while true; do n=$((n+1)); echo line $n; sleep 0.02; done")
    with started(tmp_path, {"command": loud}) as daemon:
        daemon.start()
        ready(daemon, "a")
        until_logged(daemon, "a", "line 2")
        assert ctl(daemon, "logs", "a").stderr == ""
        log = tmp_path / "logs" / "a.log"
        log.unlink()
        if how == "replaced":
            log.write_text("of somebody else\n")
        elif how == "adopted":
            crash(daemon)
            daemon.start()
            ready(daemon, "a")
        what = "was replaced by another file" if how == "replaced" else "was deleted while it runs"
        until(lambda: what in story(daemon, "a"), "it is reported")
        assert story(daemon, "a").count(what) == 1
        for words in (["logs", "a"], ["-o", "json", "logs", "a"]):
            done = ctl(daemon, *words)
            assert (done.returncode, what in done.stderr, what in done.stdout) == (0, True, False)
        assert "fleetctl restart a" in done.stderr
        assert order(daemon, "restart", "a").status == 200
        until_logged(daemon, "a", "line 2")
        assert ctl(daemon, "logs", "a").stderr == ""


def test_memory_limit_and_backoff_change_without_restart(tmp_path: Path) -> None:
    with started(tmp_path, {"command": SLEEPER}) as daemon:
        daemon.start()
        pid = ready(daemon, "a")
        hot = {
            "limits": {"memory": "1GiB"}, "restart": QUICK, "stop": {"timeout": "3s"}, "max_age": "1h", "depends_on": [],
            "logs": {"max_size": "1MiB"}, "probes": {"liveness": {"exec": ["true"]}}, "hooks": {"post_stop": ["true"]},
            "schedule": {"restart": "0 4 * * *"}, "watch": {"paths": ["x"]},
        }  # fmt: skip
        before = daemon.status()["daemon"]["config_hash"]
        daemon.write(fleet({"a": {"command": SLEEPER, **hot}}))
        until(lambda: daemon.status()["daemon"]["config_hash"] != before, "it is applied")
        row = daemon.process_row("a")
        assert (row["pid"], row["generation"]) == (pid, 1)
        os.kill(pid, signal.SIGKILL)
        until(lambda: daemon.process_row("a")["generation"] == 2, "the new backoff is used")


def test_success_codes_apply_to_completed(tmp_path: Path) -> None:
    services = {
        "step": {"command": sh("exit 5"), "restart": {"policy": "on-failure", "success_codes": [0, 5]}},
        "a": {"command": SLEEPER, "depends_on": {"step": "completed"}},
    }
    with fleetd(tmp_path, fleet(services)) as daemon:
        daemon.start()
        ready(daemon, "a")


def test_assigned_ports_survive_restarts_and_edits(tmp_path: Path) -> None:
    service = {"command": json.loads(fake()), "probes": {"startup": {"http": "/health"}}}
    with fleetd(tmp_path, fleet({"a": service})) as daemon:
        daemon.start()
        ready(daemon, "a")
        port = daemon.process_row("a")["port"]
        with socket.create_connection(("127.0.0.1", port), 2):
            pass
        daemon.write(fleet({"before": service, "a": service}))
        ready(daemon, "before")
        assert daemon.process_row("a")["port"] == port
        crash(daemon)
        daemon.start()
        ready(daemon, "a")
        assert daemon.process_row("a")["port"] == port


NODE_LIKE = """
import json, os, sys, time
fd = int(os.environ["NODE_CHANNEL_FD"])
while not os.path.exists("go"):
    time.sleep(0.02)
os.write(fd, b'"ready"\\n')
received = b""
while b'"shutdown"\\n' not in received:
    block = os.read(fd, 1000)
    if not block:
        time.sleep(1000)
    received += block
print("ended by a message")
"""


def test_node_channel_carries_ready_and_shutdown(tmp_path: Path) -> None:
    """Case 26: wait_ready and shutdown_with_message of PM2; no message is a failure."""
    service = {
        "command": python(NODE_LIKE.replace("$", "$$")), "restart": {"crash_loop": {"count": 1}},
        "probes": {"startup": {"message": "ready", "period": "20ms", "deadline": "20s"}},
        "stop": {"message": "shutdown", "timeout": "20s"},
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        until(lambda: "has not sent 'ready' yet" in daemon.control("GET", "/v1/processes/a").body.decode(), "it waits")
        assert daemon.process_row("a")["state"] == "STARTING"
        (tmp_path / "go").touch()
        pid = ready(daemon, "a")
        assert daemon.control("POST", "/v1/reexec", {}).status == 202
        until(lambda: daemon.log().count("fleetd is up") == 2, "the new program is up")
        assert ready(daemon, "a") == pid
        assert order(daemon, "stop", "a").status == 200
        assert daemon.process_row("a")["last_exit"]["code"] == 0
        assert "ended by a message" in daemon.log_of("a")


def test_program_without_ready_message_is_not_ready(tmp_path: Path) -> None:
    service = {
        "command": SLEEPER, "restart": {"crash_loop": {"count": 1}},
        "probes": {"startup": {"message": "ready", "deadline": "400ms"}},
    }  # fmt: skip
    with started(tmp_path, service) as daemon:
        daemon.start()
        assert "not ready within 0.4 s" in daemon.until_state("a", "FAILED")["reason"]
