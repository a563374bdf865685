"""One YAML file to a tree of nodes, each with its place.

Invariants:
- A file is refused by its size before it is read, and by depth, nodes and alias expansion while it is parsed: the
  tree is built from parser events, one after another, so nothing recurses and nothing is built beyond a limit.
- Keys keep their text; two equal keys are a mistake that names both places. No tags, no complex keys, one document.
- Aliases share nodes; `size` counts a node as often as it is used, which is what bounds an alias bomb.
- Every refusal is a `Problem` with line and column; nothing of PyYAML's own errors reaches the caller.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from fleetd.config.yaml.scalars import NULLS
from fleetd.errors import ConfigError, Problem

MAX_FILE_BYTES = 4 * 1024 * 1024
MAX_DEPTH = 32
MAX_NODES = 100_000
MAX_PROBLEMS = 100
_LONGEST_EXCERPT = 160
_LONGEST_MESSAGE = 1000

_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_FORBIDDEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\x80-\x84\x86-\x9f\ud800-\udfff\ufffe\uffff]")
_DIRECTIVE = re.compile(r"^%(?!YAML 1\.[12]\s*$).*", re.MULTILINE)
_LINE_BREAK = re.compile("\r\n|[\n\r\x85\u2028\u2029]")  # what the parser counts as the end of a line
_TAB_INDENT = re.compile(r"^ *\t", re.MULTILINE)


def printable(text: str) -> str:
    """Return a text on one line, bounded, without control characters."""
    if len(text) > _LONGEST_MESSAGE:
        text = text[:_LONGEST_MESSAGE] + "…"
    return text if text.isprintable() else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)


@dataclass(slots=True, eq=False)
class Source:
    """One file that was read: name to show, path, and lines for excerpts."""

    shown: str
    path: Path
    order: int = 0
    text: str = ""
    _lines: list[str] | None = None
    folder: Path = field(init=False)  # that relative paths in it start from

    def __post_init__(self) -> None:
        self.folder = self.path.parent

    def excerpt(self, line: int, column: int) -> tuple[str, int]:
        """Return the line around a place, tabs as blanks, and the column in it."""
        if self._lines is None:
            self._lines = _LINE_BREAK.split(self.text)
        if not 0 < line <= len(self._lines):
            return "", 0
        text = self._lines[line - 1].replace("\t", " ")
        if column <= _LONGEST_EXCERPT:
            return text[:_LONGEST_EXCERPT], column
        start = column - _LONGEST_EXCERPT // 2
        return "…" + text[start : start + _LONGEST_EXCERPT], column - start + 1

    def problem(self, line: int, column: int, message: str, path: str = "") -> Problem:
        return Problem(self.shown, line, column, printable(path), printable(message), *self.excerpt(line, column))


class Node:
    """A scalar, sequence or mapping with its place, counted from 1.

    `value` is the text, a list of nodes, or a dict of nodes. `raw` is the text before interpolation, where that changed it.
    `key_line` is 0 if it is not the value of a key.
    """

    __slots__ = ("column", "height", "key_column", "key_line", "line", "plain", "raw", "size", "source", "value")

    def __init__(self, value: Any, source: Source, line: int, column: int, plain: bool = False) -> None:
        self.value = value
        self.source = source
        self.line = line
        self.column = column
        self.plain = plain
        self.key_line = 0
        self.key_column = 0
        self.size = 1
        self.height = 1
        self.raw: str | None = None

    def copy(self) -> Node:
        """Return a node of its own that shares the children."""
        twin = Node(self.value, self.source, self.line, self.column, self.plain)
        twin.key_line, twin.key_column, twin.raw = self.key_line, self.key_column, self.raw
        twin.size, twin.height = self.size, self.height
        return twin

    @property
    def is_null(self) -> bool:
        return self.plain and self.raw is None and self.value in NULLS

    def problem(self, message: str, path: str = "", *, at_key: bool = False) -> Problem:
        """Return a problem at the value, or at its key."""
        if at_key and self.key_line:
            return self.source.problem(self.key_line, self.key_column, message, path)
        return self.source.problem(self.line, self.column, message, path)


def read_source(path: Path, shown: str, order: int = 0) -> Source:
    """Read a file as UTF-8 text, bounded. Raises ConfigError."""
    source = Source(shown, path, order)
    try:
        raw = _read_bounded(path)
    except FileNotFoundError:
        raise ConfigError([source.problem(0, 0, "there is no such file")]) from None
    except _NotAFile as error:
        raise ConfigError([source.problem(0, 0, str(error))]) from None
    except OSError as error:
        raise ConfigError([source.problem(0, 0, f"cannot be read: {error.strerror or error}")]) from None
    source.text = _decode(raw, source)
    _check_characters(source)
    return source


class _NotAFile(Exception):
    pass


def _read_bounded(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    try:
        facts = os.fstat(descriptor)
        if stat.S_ISDIR(facts.st_mode):
            raise _NotAFile("is a folder, not a file")
        if not stat.S_ISREG(facts.st_mode):
            raise _NotAFile("is not a regular file")
        raw = bytearray()
        while facts.st_size <= MAX_FILE_BYTES >= len(raw):
            part = os.read(descriptor, MAX_FILE_BYTES + 1 - len(raw))
            if not part:
                return bytes(raw)
            raw += part
        size = max(facts.st_size, len(raw))
        raise _NotAFile(f"is {size} bytes long: a configuration file may have {MAX_FILE_BYTES} at most")
    finally:
        os.close(descriptor)


def _decode(raw: bytes, source: Source) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ConfigError([source.problem(1, 1, "is UTF-16 (save the file as UTF-8)")])
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        good = raw[: error.start].decode("utf-8")
        line, column = _place(good, len(good))
        source.text = good
        message = f"byte 0x{raw[error.start]:02x} is not valid UTF-8: save the file as UTF-8"
        raise ConfigError([source.problem(line, column, message)]) from None


def _place(text: str, index: int) -> tuple[int, int]:
    return text.count("\n", 0, index) + 1, index - (text.rfind("\n", 0, index) + 1) + 1


def _check_characters(source: Source) -> None:
    bad = _FORBIDDEN.search(source.text)
    if bad is not None:
        line, column = _place(source.text, bad.start())
        message = f"the control character U+{ord(bad[0]):04X} is not allowed here"
        raise ConfigError([Problem(source.shown, line, column, "", message)])
    directive = _DIRECTIVE.search(source.text)
    if directive is not None:
        line, column = _place(source.text, directive.start())
        raise ConfigError([source.problem(line, column, "YAML directives are not supported (remove this line)")])


def compose(source: Source, report: Callable[[list[Problem]], None] | None = None) -> Node:
    """Return the root of the only document. Raises ConfigError if there is no tree.

    Duplicate keys and tags are reported, and the rest of the file is checked: two mappings under one key are merged, of other
    values the first counts. Without `report` they are raised.
    """
    composer = _Composer(source)
    loader = _Loader(source.text)
    try:
        for event in _events(loader):
            composer.feed(event)
    except yaml.MarkedYAMLError as error:
        raise ConfigError([*composer.problems, _syntax_problem(source, error)]) from None
    except yaml.YAMLError as error:
        raise ConfigError([*composer.problems, source.problem(0, 0, f"is not YAML: {error}")]) from None
    finally:
        loader.dispose()
    if composer.problems and report is None:
        raise ConfigError(composer.problems)
    if report is not None:
        report(composer.problems)
    if composer.root is None or composer.root.is_null:
        raise ConfigError(
            [source.problem(0, 0, "is empty: a fleet needs at least one of services, instances or models")]
        )
    return composer.root


def _events(loader: Any) -> Iterator[Any]:
    while (event := loader.get_event()) is not None:
        yield event


def _syntax_problem(source: Source, error: yaml.MarkedYAMLError) -> Problem:
    mark = error.problem_mark or error.context_mark
    line, column = (mark.line + 1, mark.column + 1) if mark is not None else (0, 0)
    lines = _LINE_BREAK.split(source.text)
    before = lines[line - 1][:column] if 0 < line <= len(lines) else ""
    what = error.problem or "is not YAML"
    if "\t" in before and ("cannot start any token" in what or _TAB_INDENT.match(before)):
        message = "a tab cannot be used for indentation in YAML: use spaces"
    elif before.endswith(("${", "$")):
        message = 'a variable inside [ ] or { } must be in quotes: "${NAME}"'
    elif "mapping values are not allowed" in what:
        message = "a ': ' is not allowed here: quote the value, or look at the indentation"
    elif "could not find expected ':'" in what:
        message = "expected 'key: value' here"
    else:
        message = f"is not YAML: {what}"
        if error.context:
            message += f" ({error.context})"
    return source.problem(line, column, message)


@dataclass(slots=True)
class _Open:
    """A mapping or sequence that has not ended yet."""

    node: Node
    anchor: str | None
    key: str | None = None
    key_mark: Any = None
    key_plain: bool = False
    merges: list[Node] = field(default_factory=list)


class _Composer:
    def __init__(self, source: Source) -> None:
        self.source = source
        self.root: Node | None = None
        self.problems: list[Problem] = []
        self._stack: list[_Open] = []
        self._anchors: dict[str, Node] = {}
        self._open_anchors: set[str] = set()
        self._documents = 0
        self._nodes = 0

    def feed(self, event: Any) -> None:
        if isinstance(event, yaml.ScalarEvent):
            self._scalar(event)
        elif isinstance(event, yaml.MappingStartEvent):
            self._start(event, {})
        elif isinstance(event, yaml.SequenceStartEvent):
            self._start(event, [])
        elif isinstance(event, yaml.MappingEndEvent | yaml.SequenceEndEvent):
            self._end()
        elif isinstance(event, yaml.AliasEvent):
            self._alias(event)
        elif isinstance(event, yaml.DocumentStartEvent):
            self._documents += 1
            if self._documents > 1:
                self._fail(event.start_mark, "a second document starts here: one file holds one document")

    def _fail(self, mark: Any, message: str) -> None:
        raise ConfigError([*self.problems, self.source.problem(mark.line + 1, mark.column + 1, message)])

    def _note(self, line: int, column: int, message: str) -> None:
        self.problems.append(self.source.problem(line, column, message))
        if len(self.problems) >= MAX_PROBLEMS:
            raise ConfigError(self.problems)

    def _new(self, event: Any, value: Any, plain: bool) -> Node:
        mark = event.start_mark
        if event.tag is not None:
            self._note(mark.line + 1, mark.column + 1, f"tags such as {event.tag[:40]} are not supported (remove it)")
        self._nodes += 1
        if self._nodes > MAX_NODES:
            self._fail(mark, f"the file has more than {MAX_NODES} values (split the fleet)")
        return Node(value, self.source, mark.line + 1, mark.column + 1, plain)

    def _scalar(self, event: Any) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and top.key is None and type(top.node.value) is dict:
            if event.tag is not None:
                self._fail(event.start_mark, f"tags such as {event.tag[:40]} are not supported (remove it)")
            top.key, top.key_mark, top.key_plain = event.value, event.start_mark, not event.style
            if event.anchor is not None:
                self._anchors[event.anchor] = self._new(event, event.value, top.key_plain)
            return
        node = self._new(event, event.value, not event.style)
        if event.anchor is not None:
            self._anchors[event.anchor] = node
        self._place(node)

    def _start(self, event: Any, value: Any) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and top.key is None and type(top.node.value) is dict:
            self._fail(event.start_mark, "a key must be plain text")
        if len(self._stack) >= MAX_DEPTH:
            self._fail(event.start_mark, f"nested more than {MAX_DEPTH} levels deep")
        self._stack.append(_Open(self._new(event, value, False), event.anchor))
        if event.anchor is not None:
            self._anchors.pop(event.anchor, None)
            self._open_anchors.add(event.anchor)

    def _end(self) -> None:
        done = self._stack.pop()
        if done.merges:
            self._merge(done)
        if done.anchor is not None:
            self._open_anchors.discard(done.anchor)
            self._anchors[done.anchor] = done.node
        self._place(done.node)

    def _alias(self, event: Any) -> None:
        top = self._stack[-1] if self._stack else None
        if top is not None and top.key is None and type(top.node.value) is dict:
            self._fail(event.start_mark, "a key must be plain text, not an alias")
        node = self._anchors.get(event.anchor)
        if node is None:
            what = "refers to itself" if event.anchor in self._open_anchors else "has no anchor above it"
            self._fail(event.start_mark, f"the alias *{event.anchor[:40]} {what}")
            return
        self._place(node.copy(), event.start_mark)

    def _place(self, node: Node, alias_mark: Any = None) -> None:
        if not self._stack:
            self.root = node
            return
        top = self._stack[-1]
        self._grow(top.node, node, alias_mark)
        if type(top.node.value) is list:
            top.node.value.append(node)
            return
        key, mark = top.key, top.key_mark
        top.key = None
        node.key_line, node.key_column = mark.line + 1, mark.column + 1
        if key == "<<" and top.key_plain:
            self._add_merge(top, node)
            return
        assert key is not None
        first = top.node.value.get(key)
        if first is not None:
            first_place = f"{self.source.shown}:{first.key_line}:{first.key_column}"
            self._note(node.key_line, node.key_column, f"the key {key[:60]!r} is defined twice: first at {first_place}")
            if type(first.value) is dict and type(node.value) is dict:  # later checks see the contents of both
                both = top.node.value[key] = first.copy()
                both.value = {**node.value, **first.value}
            return
        top.node.value[key] = node

    def _grow(self, parent: Node, child: Node, alias_mark: Any) -> None:
        parent.size += child.size
        if child.height >= parent.height:
            parent.height = child.height + 1
        if parent.size > MAX_NODES or parent.height > MAX_DEPTH + 1:
            line, column = (child.line, child.column)
            if alias_mark is not None:
                line, column = alias_mark.line + 1, alias_mark.column + 1
            limit = (
                f"to more than {MAX_NODES} values" if parent.size > MAX_NODES else f"more than {MAX_DEPTH} levels deep"
            )
            raise ConfigError([*self.problems, self.source.problem(line, column, f"aliases expand {limit}")])

    def _add_merge(self, top: _Open, node: Node) -> None:
        parts = node.value if type(node.value) is list else [node]
        if top.merges:
            self._note(node.key_line, node.key_column, "'<<' is given twice (use one list, <<: [*a, *b])")
        for part in parts:
            if type(part.value) is dict:
                top.merges.append(part)
            else:
                self._note(part.line, part.column, "'<<' merges mappings only (write <<: *name or <<: [*a, *b])")

    def _merge(self, done: _Open) -> None:
        for part in done.merges:
            for key, value in part.value.items():
                done.node.value.setdefault(key, value)
