"""Print figures of the structure of fleetd: sizes, imports, and how many files a request or an event passes through.

    python tests/support/structure.py [ROOT]

ROOT is a checkout, this one by default: figures of an older commit come from a worktree of it. A walk runs a real daemon
with a profile function in all its threads. A move is a call from a function of one file to a function of another one.
A function only passes on if its body is one call with its own parameters. Each walk runs five times; the shortest counts,
since timers of the daemon can fall into a walk.
"""

from __future__ import annotations

import argparse
import ast
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[2]
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))  # run as a file, with ROOT another checkout

from tests.support.import_graph import cycles, dotted, import_graph, levels, nodes  # noqa: E402
from tests.support.ports import free_port  # noqa: E402
from tests.support.waiting import descendants, until  # noqa: E402

FAKE = HERE / "tests" / "fakes" / "fake_model_server.py"
RUNS = 5
QUIET_S = 1.5  # after an event, before the next walk

# The traced daemon. It records while the file `armed` exists, and writes `moves` when the file goes.
TRACER = """
import dis, functools, json, os, sys, threading, time
root, folder = sys.argv[1:3]
sys.path.insert(0, root)
package = root + "/fleetd/"
armed = False
moves = []

@functools.cache
def start_of(code):
    return next((one.offset for one in dis.get_instructions(code) if one.opname == "RESUME"), 0)

def note(frame, event, argument):
    code = frame.f_code
    if not armed or event != "call" or not code.co_filename.startswith(package):
        return
    if frame.f_lasti > start_of(code):  # a coroutine that is resumed is no new call
        return
    caller = frame.f_back
    while caller is not None and not caller.f_code.co_filename.startswith(package):
        caller = caller.f_back
    source = caller.f_code.co_filename if caller is not None else None
    moves.append((source, code.co_filename, code.co_firstlineno))

def control():
    global armed
    while True:
        wanted = os.path.exists(folder + "/armed")
        if wanted and not armed:
            moves.clear()
            armed = True
            open(folder + "/recording", "w").close()
        elif armed and not wanted:
            armed = False
            with open(folder + "/moves.part", "w") as file:
                json.dump(moves, file)
            os.rename(folder + "/moves.part", folder + "/moves")
        time.sleep(0.005)

threading.Thread(target=control, daemon=True).start()
threading.setprofile(note)
sys.setprofile(note)
sys.argv = ["fleetd", *sys.argv[3:]]
from fleetd.__main__ import main
main()
"""


@dataclass(frozen=True)
class Walk:
    """The files that one walk touched, its moves between files, and how many of them only pass on."""

    files: int
    moves: int
    passing: int

    def __str__(self) -> str:
        share = 100 * self.passing / self.moves if self.moves else 0.0
        return f"{self.files:3} files, {self.moves:4} moves between files, {share:4.1f} % through functions that only pass on"


def passes_on(function: ast.AST) -> bool:
    """Return whether the body of a function is one call with its own parameters, attributes of them or constants."""
    if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
        return False
    body = [one for one in function.body if not (isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant))]
    if len(body) != 1 or not isinstance(body[0], ast.Return | ast.Expr):
        return False
    value = body[0].value
    if isinstance(value, ast.Await | ast.YieldFrom):
        value = value.value
    if not isinstance(value, ast.Call):
        return False
    words = [*value.args, *(keyword.value for keyword in value.keywords)]
    return all(isinstance(word, ast.Name | ast.Attribute | ast.Constant | ast.Starred) for word in words)


def functions_that_pass_on(files: list[Path]) -> set[tuple[str, int]]:
    """Return (file, first line) of these functions; the first line is that of a decorator, as in a code object."""
    return {
        (str(path), min([node.lineno, *(one.lineno for one in node.decorator_list)]))
        for path in files
        for node in nodes(path.read_text("utf-8"))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and passes_on(node)
    }


class TracedDaemon:
    """A daemon with one model and one service, whose calls can be recorded."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.folder = Path(tempfile.mkdtemp(prefix="fd-"))
        self.port = free_port()
        self.config = self.folder / "fleet.yaml"
        self.write("0")
        words = [str(root), str(self.folder), "run", "--config", str(self.config)]
        env = {**os.environ, "PYTHONPATH": str(root)}
        with (self.folder / "log").open("wb") as log:
            command = [sys.executable, "-c", TRACER, *words]
            self.process = subprocess.Popen(command, cwd=self.folder, env=env, stdout=log, stderr=log)

    def write(self, value: str) -> None:
        """Write fleet.yaml with one value in the environment of the service."""
        fake = json.dumps([sys.executable, "-I", str(FAKE), "--api", "openai", "--port", "{port}"])
        text = f"""
            version: 1
            paths: {{state: ./state, run: {self.folder}, logs: ./logs}}
            gateway: {{listen: 127.0.0.1:{self.port}}}
            services:
              a:
                command: [sleep, "1000"]
                env: {{VALUE: "{value}"}}
                restart: {{backoff: {{initial: 20ms, max: 50ms, jitter: 0}}, crash_loop: {{count: 1000}}}}
            models:
              m: {{engine: process, command: {fake}, memory: 1MiB}}
        """
        part = self.folder / "part"
        part.write_text(textwrap.dedent(text), "utf-8")
        part.replace(self.config)

    def chat(self) -> bool:
        """Send one chat request. Returns whether it was answered."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            body = {"model": "m", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
            response = connection.getresponse()
            response.read()
            return response.status == 200
        except OSError:
            return False
        finally:
            connection.close()

    def service_pid(self) -> int | None:
        """Return the PID of the running `sleep`."""
        for pid in descendants(self.process.pid):
            command = Path(f"/proc/{pid}/cmdline")
            try:
                if command.read_bytes().startswith(b"sleep\0"):
                    return pid
            except OSError:
                continue
        return None

    def record(self, action: Callable[[], Any]) -> list[list[Any]]:
        """Return the calls between files of fleetd during an action."""
        (self.folder / "armed").touch()
        until((self.folder / "recording").exists, "the daemon records")
        action()
        (self.folder / "armed").unlink()
        until((self.folder / "moves").exists, "the calls are written")
        found: list[list[Any]] = json.loads((self.folder / "moves").read_text())
        (self.folder / "moves").unlink()
        (self.folder / "recording").unlink()
        return found

    def replace_service(self, action: Callable[[int], Any]) -> Callable[[], Any]:
        """Return an action that ends when another process of the service runs."""
        pid = until(self.service_pid, "the service runs")

        def replaced() -> None:
            action(pid)
            until(lambda: self.service_pid() not in (None, pid), "the service runs again")
            time.sleep(0.2)  # READY follows the spawn

        return replaced

    def close(self) -> None:
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


def summarize(calls: list[list[Any]], passing: set[tuple[str, int]]) -> Walk:
    """Count the files, the moves between files and the moves into functions that only pass on."""
    between = [(target, line) for source, target, line in calls if source is not None and source != target]
    return Walk(len({target for _, target, _ in calls}), len(between), sum(move in passing for move in between))


def walks(root: Path) -> dict[str, Walk]:
    """Return the shortest walk of each kind."""
    passing = functions_that_pass_on(sorted((root / "fleetd").rglob("*.py")))
    found: dict[str, list[Walk]] = {}
    daemon = TracedDaemon(root)

    def walk(name: str, action: Callable[[], Any]) -> None:
        found.setdefault(name, []).append(summarize(daemon.record(action), passing))
        time.sleep(QUIET_S)

    try:
        until(daemon.chat, f"the daemon answers: {(daemon.folder / 'log').read_text()[-2000:]}", 60)
        time.sleep(QUIET_S)
        for turn in range(RUNS):
            walk("a warm request", daemon.chat)
            walk("a saved key", daemon.replace_service(lambda pid, turn=turn: daemon.write(f"{turn + 1}")))
            walk("a death of a child and its respawn", daemon.replace_service(lambda pid: os.kill(pid, signal.SIGKILL)))
    finally:
        daemon.close()
    return {name: min(these, key=lambda one: one.moves) for name, these in found.items()}


def figures(root: Path) -> list[str]:
    """Return the lines about files and imports."""
    paths = sorted((root / "fleetd").rglob("*.py"))
    sources = {dotted(path, root): (path.read_text("utf-8"), path.name == "__init__.py") for path in paths}
    folders = Counter(path.parent for path in paths)
    largest, count = folders.most_common(1)[0]
    longest = max(paths, key=lambda path: path.read_text("utf-8").count("\n"))
    graph = import_graph(sources, root)
    daemon = {
        module: {target for target in targets if target.startswith("fleetd.daemon.")}
        for module, targets in graph.items()
        if module.startswith("fleetd.daemon.")
    }
    classes = Counter(
        node.name for text, _ in sources.values() for node in nodes(text) if isinstance(node, ast.ClassDef)
    )
    found = cycles(graph)
    return [
        f"files of fleetd/: {len(paths)}, lines: {sum(path.read_text('utf-8').count(chr(10)) for path in paths)}",
        f"largest folder: {largest.relative_to(root)}, {count} modules",
        f"longest module: {longest.relative_to(root)}, {longest.read_text('utf-8').count(chr(10))} lines",
        f"daemon/: {len(daemon)} modules, {sum(map(len, daemon.values()))} import arrows, {levels(daemon)} levels",
        f"import cycles: {len(found)}" + "".join(f"\n  {', '.join(group)}" for group in found),
        f"class names defined more than once: {sum(number > 1 for number in classes.values())}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description="Print figures of the structure of fleetd.")
    parser.add_argument("root", nargs="?", type=Path, default=HERE, help="a checkout; this one by default")
    root = parser.parse_args().root.resolve()
    print("\n".join(figures(root)), flush=True)
    for name, walk in walks(root).items():
        print(f"{name}: {walk}")


if __name__ == "__main__":
    main()
