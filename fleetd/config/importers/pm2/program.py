"""The command line of a PM2 app: which file PM2 runs, and with which interpreter.

Invariants:
- As PM2 does: the script is looked for in cwd, then on PATH; a known ending decides the interpreter; what is no binary, folders
  included, is run by node. Without the files, the command is what the app says.
- Nothing is run; of a file, at most `_HEAD_BYTES` are read, and regular files only.
"""

from __future__ import annotations

import os
import re
import shutil
import stat
from pathlib import Path, PurePosixPath

BY_SUFFIX = {
    ".js": "node", ".mjs": "node", ".cjs": "node", ".py": "python3", ".sh": "bash", ".rb": "ruby", ".php": "php", ".pl": "perl",
    ".ts": "bun", ".tsx": "bun", ".coffee": "coffee", ".ls": "lsc",
}  # fmt: skip
_HEAD_BYTES = 1 << 20
_SAYS_READY = re.compile(rb"process\s*\.\s*send\b[^\n]{0,80}\(\s*['\"`]ready['\"`]")
_NODES = frozenset({"node", "nodejs", "bun"})


def command_of(
    script: str, interpreter: str | None, options: list[str], args: list[str], cwd: Path | None
) -> list[str]:
    """Return the words that PM2 runs. `interpreter` is "none", a program, or None: PM2 chooses; `cwd` None: unknown."""
    path, shown = _located(script, cwd, whole=interpreter not in (None, "none"))
    if interpreter is None:
        interpreter = BY_SUFFIX.get(PurePosixPath(script).suffix) or _by_content(path)
        if interpreter != "none":
            _, shown = _located(script, cwd, whole=True)
    if interpreter == "none":
        return [shown, *args]
    return [interpreter, *options, shown, *args]


def _located(script: str, cwd: Path | None, *, whole: bool) -> tuple[Path | None, str]:
    """Return the file and the word for it; with `whole`, one that is on PATH only is written with its path."""
    if cwd is not None and (cwd / script).exists():
        return cwd / script, script if "/" in script or whole else f"./{script}"
    found = shutil.which(script) if "/" not in script else None
    if found is None:
        return None, script
    return Path(found), found if whole else script


def _by_content(path: Path | None) -> str:
    """Return "node" for a folder and for text that cannot run by itself, otherwise "none"."""
    if path is None:
        return "none"
    if path.is_dir():
        return "node"
    head = head_of(path)
    if not head or b"\0" in head[:512] or (head.startswith(b"#!") and os.access(path, os.X_OK)):
        return "none"
    return "node"


def head_of(path: Path) -> bytes:
    """Return the first bytes of a regular file; nothing where it cannot be read."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            return stream.read(_HEAD_BYTES) if stat.S_ISREG(os.fstat(descriptor).st_mode) else b""
    except (OSError, ValueError):
        return b""


def is_node(words: list[str]) -> bool:
    """Return whether a command is run by Node, which has a channel to its supervisor."""
    return bool(words) and PurePosixPath(words[0]).name in _NODES


def starts_node(words: list[str]) -> bool:
    """Return whether a command is, or starts, a program of Node."""
    return is_node(words) or any(
        re.search(r"\b(?:node|npm|npx|yarn|pnpm|bun|tsx|ts-node)\b", word) for word in words[:3]
    )


def main_file(words: list[str], cwd: Path | None) -> Path | None:
    """Return the program's own file among the words of a command: of a folder its index.js."""
    for word in words[1:]:
        if not word.startswith("-"):
            path = (cwd or Path()) / word
            return path / "index.js" if path.is_dir() else path
    return None


def says_ready(path: Path | None) -> bool:
    """Return whether a program's file sends the message that it is ready."""
    return path is not None and _SAYS_READY.search(head_of(path)) is not None
