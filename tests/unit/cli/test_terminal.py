"""How `fleetctl` behaves on terminals and in pipes: width, colour, encodings, interruption."""

from __future__ import annotations

import re
import signal
import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.support.cli import FLEETCTL, Ran, environment, fleetctl, on_terminal

ESCAPE = "\x1b["


def on(fleet: Path, *arguments: str, **env: str) -> Ran:
    return fleetctl(*arguments, FLEETD_SOCKET=str(fleet), **env)


def shown(fleet: Path, *arguments: str, columns: int = 80, typed: str = "", **env: str) -> Ran:
    return on_terminal(*arguments, columns=columns, typed=typed, FLEETD_SOCKET=str(fleet), **env)


@pytest.mark.parametrize("columns", [20, 40, 60, 100, 200])
@pytest.mark.parametrize("arguments", [["status"], ["ps"], ["start", "web", "ollama"]], ids=lambda value: value[0])
def test_no_line_is_wider_than_the_terminal(fleet: Path, arguments: list[str], columns: int) -> None:
    out = re.sub(r"\x1b\[[0-9;]*m", "", shown(fleet, *arguments, columns=columns).out)
    assert max(len(line) for line in out.splitlines()) <= columns
    assert re.search(r"(?m)^(web|uly)", out)


def test_narrow_terminal_keeps_important_columns(fleet: Path) -> None:
    out = shown(fleet, "status", columns=40, NO_COLOR="1").out
    head = out.splitlines()[0]
    assert head.startswith("NAME")
    assert "STATE" in head
    assert "FAILED" in out


def test_colour_on_a_terminal_only(fleet: Path) -> None:
    assert ESCAPE + "32mREADY" in shown(fleet, "status").out
    assert ESCAPE not in on(fleet, "status").out
    assert ESCAPE not in shown(fleet, "status", NO_COLOR="1").out
    assert ESCAPE in shown(fleet, "status", NO_COLOR="").out
    assert ESCAPE not in shown(fleet, "status", "--color", "never").out
    assert ESCAPE not in shown(fleet, "--color", "never", "status").out
    assert ESCAPE + "32mREADY" in on(fleet, "status", "--color", "always").out


@pytest.mark.parametrize("arguments", [["status"], ["status", "web"], ["ps"], ["diff"], ["explain", "ulysses"]])
def test_no_lines_are_drawn_in_pipes(fleet: Path, arguments: list[str]) -> None:
    assert not re.search("[\u2500-\u257f]", on(fleet, *arguments).out)


def test_several_logs_have_prefixes_of_their_colours(fleet: Path) -> None:
    out = shown(fleet, "logs", "web", "ollama-1", "-n", "2").out
    assert ESCAPE + "36mweb" in out
    assert ESCAPE + "33mollama-1" in out
    assert ESCAPE + "31mred" in out, "a line keeps its own colour on a terminal that has colour"
    plain = shown(fleet, "logs", "web", "ollama-1", "-n", "2", NO_COLOR="1").out
    assert ESCAPE not in plain
    assert ESCAPE + "31mred" in on(fleet, "logs", "web", "-n", "1").out, "a pipe gets the line as it is"


@pytest.mark.parametrize(
    "arguments", [["status"], ["logs", "web", "-n", "1000"], ["events", "-f"], ["logs", "web", "-f"]]
)
def test_closed_reader_is_no_error(fleet: Path, arguments: list[str]) -> None:
    with subprocess.Popen(
        [*FLEETCTL, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(FLEETD_SOCKET=str(fleet)),
    ) as started:
        assert started.stdout is not None
        assert started.stderr is not None
        assert started.stdout.readline()
        started.stdout.close()
        assert started.wait(30) == 0
        assert started.stderr.read() == b""


def test_full_disk_is_reported_plainly(fleet: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("this system has no /dev/full")
    with full.open("wb") as out:
        done = subprocess.run(
            [*FLEETCTL, "status"],
            stdout=out,
            stderr=subprocess.PIPE,
            env=environment(FLEETD_SOCKET=str(fleet)),
            check=False,
        )
    assert done.returncode == 1
    assert b"cannot write" in done.stderr or b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    "env",
    [
        {"LANG": "C", "LC_ALL": "C"},
        {"LANG": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "LC_ALL": "C"},
        {"PYTHONIOENCODING": "ascii"},
        {"PYTHONIOENCODING": "latin-1"},
    ],
    ids=lambda value: ",".join(value),
)
def test_any_locale(fleet: Path, env: dict[str, str]) -> None:
    for arguments in (["status"], ["status", "web"], ["events"], ["logs", "web", "-n", "3"], ["status", "-o", "json"]):
        assert on(fleet, *arguments, **env).code == 0
    if "PYTHONIOENCODING" in env:
        out = on(fleet, "status", **env).out
        assert out.isascii()
        assert "RST" in out


@pytest.mark.parametrize(
    ("arguments", "seen"),
    [(["status", "--watch"], "ollama-2"), (["events", "-f"], "exited"), (["logs", "web", "-f"], "web says 3")],
    ids=lambda value: str(value)[:30],
)
def test_interruption_of_what_goes_on(fleet: Path, arguments: list[str], seen: str) -> None:
    interrupted = on_terminal(*arguments, interrupt_at=seen, FLEETD_SOCKET=str(fleet))
    assert interrupted.code == 130
    assert "--watch" not in arguments or "\x1b[?1049l" in interrupted.out, "the terminal is given back"


def test_interruption_of_a_wait(fleet: Path) -> None:
    """Nothing is on standard output while it waits; it waits once it holds its connection."""
    with subprocess.Popen(
        [*FLEETCTL, "start", "slow", "--timeout", "1m"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(FLEETD_SOCKET=str(fleet)),
    ) as started:
        deadline = time.monotonic() + 20
        while not psutil.Process(started.pid).net_connections("unix") and time.monotonic() < deadline:
            time.sleep(0.01)
        started.send_signal(signal.SIGINT)
        assert started.wait(20) == 130
        assert started.stderr is not None
        assert b"Traceback" not in started.stderr.read()


def test_confirmation_is_requested_on_a_terminal(fleet: Path, tmp_path: Path) -> None:
    file = tmp_path / "fleet.yaml"
    file.write_text("other")
    no = shown(fleet, "apply", str(file), typed="n\n")
    assert no.code == 1
    assert "nothing was changed" in no.err
    yes = shown(fleet, "apply", str(file), typed="y\n")
    assert yes.code == 0
    assert "new" in yes.out
