"""`fleetctl audit ollama PATH…`: count references to Ollama below some folders, by kind and file.

Invariants:
- Only text files up to a size; node_modules, .git and virtual environments are skipped.
- A route such as /api/chat counts only in a file that names Ollama or one of its ports, since other programs have such routes.
- The exit code is 0 without references, 1 with any.
"""

from __future__ import annotations

import os
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import click

from fleetd.cli.client import EXIT_FAILED, EXIT_OK, EXIT_USAGE, CliError
from fleetd.cli.context import Session, forms, say
from fleetd.cli.render import Cell, Column, clean, table
from fleetd.units import expand_home

FILE_MAX_BYTES = 2 * 1024 * 1024
FILES_MAX = 500_000
LINE_SHOWN = 160
_SKIPPED = frozenset({
    ".git", ".hg", ".svn", "node_modules", "bower_components", ".venv", "venv", "site-packages", "__pycache__", ".mypy_cache",
    ".ruff_cache", ".pytest_cache", ".tox", ".next", ".cache",
})  # fmt: skip
_ROUTES = "generate|chat|tags|pull|push|create|show|ps|embed|embeddings|copy|delete|blobs|version"
_WORDS = "serve|run|pull|push|create|list|ls|ps|show|stop|rm|cp|signin|launch"
# kind → pattern; the first kind that matches at a position counts
KINDS: dict[str, re.Pattern[str]] = {
    "env": re.compile(r"\bOLLAMA_[A-Z][A-Z0-9_]*\b"),
    "import": re.compile(
        r"\b(?:import|from|use|using)\s+(?:langchain_|llama_index\.\w+\.|langchain_community\.\w+\.)?ollama(?:_rs)?\b"
        r"|(?:require\s*\(|\bfrom|\bimport\s*\(?)\s*[\"'`]ollama(?:/[\w./-]+)?[\"'`]"
        r"|\b(?:Chat)?Ollama(?:Client|Embeddings?|LLM|Functions|Multimodal)?\s*\("
    ),
    "package": re.compile(
        r"\bollama/ollama\b|github\.com/(?:ollama|jmorganca)/ollama[\w/.-]*|@langchain/ollama|\bollama-ai-provider[\w-]*"
        r"|\b(?:langchain|llama-index-llms|llama-index-embeddings|haystack|autogen-ext)[-_\[]ollama\b|\bollama-(?:js|python|rs)\b"
        r"|[\"']ollama[\"']\s*:\s*[\"'][\^~>=<*\d]|^\s*[\"']?ollama\s*(?:\[[\w,]+\])?\s*[=<>~!]=[^\"']*"
        r"|\b(?:npm|pnpm|yarn|bun|pip|pip3|uv|brew|apt|apt-get|pipx)\s+(?:add|install|i)\s[^#;&|]*?\bollama\b",
        re.MULTILINE,
    ),
    "config": re.compile(r"\b(?:engine|provider|backend|type)[\"']?\s*[:=]\s*[\"']?ollama\b"),
    "model name": re.compile(r"[\"'`]ollama(?:_chat)?/[\w.:-]+[\"'`]"),
    "cli": re.compile(rf"(?<![\w/.-])(?:[\w./~-]*/)?ollama(?:[\"'],\s*[\[\"']*|\s+)(?:{_WORDS})\b"),
    "host": re.compile(r"\bhttps?://[\w.-]*ollama[\w.-]*|//ollama\b|\bollama[\w-]*\.(?:com|ai|local|internal|lan)\b"),
    "port": re.compile(r"(?<!\d)1143[4-6](?!\d)"),
    "route": re.compile(rf"/api/(?:{_ROUTES})\b(?![\w-])"),
}  # fmt: skip
_MENTION = re.compile(r"ollama", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Reference:
    """One reference; `line` and `column` count from one."""

    file: str
    line: int
    column: int
    kind: str
    text: str


@dataclass(slots=True)
class Audit:
    """The references found, and the skipped files: {reason: number of files}."""

    references: list[Reference] = field(default_factory=list)
    files: int = 0
    skipped: Counter[str] = field(default_factory=Counter)


def references_in(text: str, file: str, mentions: bool = False) -> Iterator[Reference]:
    """Yield the references in a text, in order of position."""
    named = _MENTION.search(text) is not None or KINDS["port"].search(text) is not None
    if not named:
        return
    kinds = {**KINDS, "mention": _MENTION} if mentions else KINDS
    for number, line in enumerate(text.splitlines(), start=1):
        taken: list[tuple[int, int]] = []
        found = []
        for kind, pattern in kinds.items():
            for match in pattern.finditer(line):
                start, end = match.span()
                if not any(start < other_end and other_start < end for other_start, other_end in taken):
                    taken.append((start, end))
                    found.append((start, kind))
        for start, kind in sorted(found):
            yield Reference(file, number, start + 1, kind, line.strip()[:LINE_SHOWN])


def audit(paths: Sequence[Path], mentions: bool = False) -> Audit:
    """Search the paths. Raises OSError for an unreadable one."""
    result = Audit()
    seen: set[tuple[int, int]] = set()
    for root in paths:
        for path in [root] if not root.is_dir() else _files(root):
            status = path.stat() if path == root else path.lstat()
            if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) in seen:
                continue
            seen.add((status.st_dev, status.st_ino))
            if len(seen) > FILES_MAX:
                raise CliError(f"more than {FILES_MAX} files: name a smaller folder", EXIT_USAGE)
            _one(path, status.st_size, result, mentions)
    return result


def _files(root: Path) -> Iterator[Path]:
    if root.is_dir() and not os.access(root, os.R_OK | os.X_OK):
        raise PermissionError(13, "Permission denied", str(root))
    for folder, below, names in os.walk(root):
        below[:] = sorted(name for name in below if name not in _SKIPPED)
        for name in sorted(names):
            yield Path(folder) / name


def _one(path: Path, size: int, result: Audit, mentions: bool) -> None:
    if size > FILE_MAX_BYTES:
        result.skipped["larger than 2 MiB"] += 1
        return
    try:
        data = path.read_bytes()
    except OSError:
        result.skipped["not readable"] += 1
        return
    if b"\0" in data[:8192]:
        result.skipped["binary"] += 1
        return
    result.files += 1
    if b"ollama" in data.lower() or b"1143" in data:
        result.references += references_in(data.decode("utf-8", "replace"), str(path), mentions)


@click.group(name="audit")
def audit_() -> None:
    """Find references to another program."""


@audit_.command(name="ollama")
@click.argument("paths", nargs=-1, required=True, metavar="PATH...", type=click.Path())
@click.option("--lines", is_flag=True, help="Show each reference with its line.")
@click.option("--mentions", is_flag=True, help="Also count the bare word.")
@forms("table", "json", "yaml")
def ollama(session: Session, paths: tuple[str, ...], lines: bool, mentions: bool) -> int:
    """Count references to Ollama in files.

    Counts environment variables, ports 11434 to 11436, hosts, imports, calls of its command, packages, engines in
    configuration, and /api routes. Skips binaries, files over 2 MiB, node_modules, .git and virtual environments.
    The exit code is 1 while there is a reference.
    """
    try:
        found = audit([Path(expand_home(path)) for path in paths], mentions)
    except OSError as error:
        raise CliError(f"{error.filename}: {error.strerror or error}", EXIT_USAGE) from None
    by_kind = Counter(one.kind for one in found.references)
    by_file: dict[str, Counter[str]] = {}
    for one in found.references:
        by_file.setdefault(one.file, Counter())[one.kind] += 1
    document = {
        "schema": "fleetctl/v1",
        "total": len(found.references),
        "files_read": found.files,
        "skipped": dict(found.skipped),
        "by_kind": dict(by_kind.most_common()),
        "by_file": [{"file": file, "total": count.total(), "kinds": dict(count)} for file, count in by_file.items()],
        "references": [
            {"file": one.file, "line": one.line, "column": one.column, "kind": one.kind, "text": one.text}
            for one in found.references
        ],
    }
    if not session.emit(document):
        _show(session, found, by_kind, by_file, lines)
    return EXIT_FAILED if found.references else EXIT_OK


def _show(session: Session, found: Audit, by_kind: Counter[str], by_file: dict[str, Counter[str]], lines: bool) -> None:
    screen = session.screen
    if found.references:
        kinds = [[Cell(kind), Cell(str(count))] for kind, count in by_kind.most_common()]
        table(screen, [Column("KIND"), Column("REFERENCES")], kinds)
        screen.line("")
        if lines:
            for one in found.references:
                screen.line(f"{clean(one.file)}:{one.line}:{one.column}: {one.kind}: {clean(one.text)}")
        else:
            rows = sorted(by_file.items(), key=lambda item: -item[1].total())
            cells = [[Cell(clean(file)), Cell(str(count.total())), Cell(_counts(count))] for file, count in rows]
            table(screen, [Column("FILE", shrink=True), Column("REFERENCES"), Column("KINDS", 1)], cells)
    skipped = ", ".join(f"{count} {reason}" for reason, count in found.skipped.items())
    text = f"{len(found.references)} references in {len(by_file)} of {found.files} files"
    say(text + (f"; left out: {skipped}" if skipped else ""))


def _counts(count: Counter[str]) -> str:
    return ", ".join(f"{kind} {times}" for kind, times in count.most_common())


VERBS: tuple[click.Command, ...] = (audit_,)
