"""Reading YAML: scalars of YAML 1.2, places, and quick rejections of invalid files."""

from __future__ import annotations

import math
import os
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from fleetd.config.yaml import parser
from fleetd.config.yaml.parser import MAX_FILE_BYTES, MAX_NODES, Source, compose, read_source
from fleetd.config.yaml.scalars import resolve
from fleetd.config.yaml.transform import plain
from fleetd.errors import ConfigError, Problem
from tests.support.cpu import slowdown


def read(text: str) -> Any:
    return plain(compose(Source("fleet.yaml", Path("fleet.yaml"), text=text)))


def rejections(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read(text)
    return [f"{one.line}:{one.column}: {one.message}" for one in caught.value.problems]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("no", "no"), ("No", "No"), ("on", "on"), ("off", "off"), ("yes", "yes"), ("y", "y"), ("n", "n"),
        ("22:22", "22:22"), ("1:30:00", "1:30:00"), ("012", 12), ("0o14", 12), ("0x1F", 31), ("1e3", 1000.0), ("1_000", "1_000"),
        ("true", True), ("FALSE", False), ("True", True), ("tRue", "tRue"), ("null", None), ("~", None), ("", None),
        ("-7", -7), ("+7", 7), ("1.5", 1.5), (".5", 0.5), ("5.", 5.0), (".inf", math.inf), ("-.inf", -math.inf),
        ("2024-01-01", "2024-01-01"), ("=", "="), ("-", "-"), (".", "."), ("0b11", "0b11"), ("1e", "1e"), ("٣", "٣"),
    ],
)  # fmt: skip
def test_resolve_follows_yaml_1_2(text: str, value: object) -> None:
    resolved = resolve(text)
    assert resolved == value
    assert type(resolved) is type(value)


@given(st.one_of(st.integers(-(10**30), 10**30), st.floats(allow_nan=False, allow_infinity=False), st.booleans()))
def test_resolve_reads_numbers_printed_by_python(value: object) -> None:
    text = str(value).lower() if isinstance(value, bool) else str(value)
    assert resolve(text) == value


def test_compose_quoted_scalars_are_strings() -> None:
    assert read("a: '012'\nb: \"no\"\nc: |\n  7\nd: >-\n  true\n") == {"a": "012", "b": "no", "c": "7\n", "d": "true"}


def test_compose_keys_keep_their_text() -> None:
    assert read("on: 1\n012: 2\nnull: 3\n3.0: 4\n") == {"on": 1, "012": 2, "null": 3, "3.0": 4}


def test_compose_resolves_anchors_and_merge_keys() -> None:
    text = "a: &a {x: 1, y: 2}\nb: {<<: *a, y: 3}\nc: {<<: [{x: 9}, *a], z: 0}\nd: *a\n"
    assert read(text) == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 3},
        "c": {"x": 9, "y": 2, "z": 0},
        "d": {"x": 1, "y": 2},
    }


def test_compose_quoted_merge_key_is_a_plain_key() -> None:
    assert read("'<<': {a: 1}\n") == {"<<": {"a": 1}}


def test_compose_nodes_have_line_and_column() -> None:
    root = compose(Source("f", Path("f"), text="a:\n  b: [1, {c: 2}]\n  ü: x\n"))
    b = root.value["a"].value["b"]
    assert (b.key_line, b.key_column, b.line, b.column) == (2, 3, 2, 6)
    c = b.value[1].value["c"]
    assert (c.key_line, c.key_column, c.line, c.column) == (2, 11, 2, 14)
    u = root.value["a"].value["ü"]
    assert (u.key_line, u.line, u.column) == (3, 3, 6)


def test_compose_alias_has_own_key_place_and_shared_value_place() -> None:
    root = compose(Source("f", Path("f"), text="a: &x {k: 1}\nb: *x\n"))
    assert (root.value["b"].key_line, root.value["b"].line) == (2, 1)
    assert root.value["a"].key_line == 1


def test_compose_duplicates_are_reported_and_merged() -> None:
    reported: list[Problem] = []
    text = "models: {a: {x: 1}, a: {y: 2}}\nmodels: {b: !t {x: 1, x: 2}}\n"
    root = compose(Source("f", Path("f"), text=text), reported.extend)
    assert [str(one).split("\n")[0] for one in reported] == [
        "f:1:21: the key 'a' is defined twice: first at f:1:10",
        "f:2:13: tags such as !t are not supported (remove it)",
        "f:2:23: the key 'x' is defined twice: first at f:2:17",
        "f:2:1: the key 'models' is defined twice: first at f:1:1",
    ]
    models = root.value["models"].value
    assert set(models) == {"a", "b"}
    assert {key: node.value for key, node in models["a"].value.items()} == {"x": "1", "y": "2"}
    assert models["b"].value["x"].value == "1"


def test_problem_in_long_line_shows_the_part_around_it() -> None:
    source = Source("f", Path("f"), text="a: [" + "1234567890, " * 50 + "wrong]\n")
    column = source.text.index("wrong") + 1
    _, line, caret = str(source.problem(1, column, "no")).split("\n")
    assert line[caret.index("^") :].startswith("wrong]")
    assert line.strip().startswith("…")
    assert len(line) < 200


BAD_YAML = {
    "duplicate key": ("a: 1\nb: 2\na: 3\n", ["3:1: the key 'a' is defined twice: first at fleet.yaml:1:1"]),
    "all duplicates": (
        "a: {x: 1, x: 2}\nb: {y: 1, y: 2}\n",
        [
            "1:11: the key 'x' is defined twice: first at fleet.yaml:1:5",
            "2:11: the key 'y' is defined twice: first at fleet.yaml:2:5",
        ],
    ),
    "quoted duplicate": ("1: a\n'1': b\n", ["2:1: the key '1' is defined twice: first at fleet.yaml:1:1"]),
    "tag": ("a: !!python/object:os.system x\n", [
        "1:4: tags such as tag:yaml.org,2002:python/object:os.syste are not supported (remove it)"]),
    "tag on a key": ("!x a: 1\n", ["1:1: tags such as !x are not supported (remove it)"]),
    "tag on a mapping": ("a: !x {b: 1}\n", ["1:4: tags such as !x are not supported (remove it)"]),
    "complex key": ("? [a]\n: 1\n", ["1:3: a key must be plain text"]),
    "alias as key": ("a: &x b\n*x : 1\n", ["2:1: a key must be plain text, not an alias"]),
    "unknown alias": ("a: *nope\n", ["1:4: the alias *nope has no anchor above it"]),
    "alias to itself": ("a: &x [*x]\n", ["1:8: the alias *x refers to itself"]),
    "merge of a scalar": ("a: {<<: 1}\n", ["1:9: '<<' merges mappings only (write <<: *name or <<: [*a, *b])"]),
    "two merges": ("a: &a {x: 1}\nb: {<<: *a, <<: *a}\n", ["2:13: '<<' is given twice (use one list, <<: [*a, *b])"]),
    "tab": ("a:\n\tb: 1\n", ["2:1: a tab cannot be used for indentation in YAML: use spaces"]),
    "two documents": ("a: 1\n---\nb: 2\n", ["2:1: a second document starts here: one file holds one document"]),
    "empty": ("", ["0:0: is empty: a fleet needs at least one of services, instances or models"]),
    "comment only": ("# hello\n", ["0:0: is empty: a fleet needs at least one of services, instances or models"]),
    "null": ("~\n", ["0:0: is empty: a fleet needs at least one of services, instances or models"]),
    "two colons": ("a: b: c\n", ["1:5: a ': ' is not allowed here: quote the value, or look at the indentation"]),
    "no colon": ("a: 1\nnonsense\nb: 2\n", ["3:1: expected 'key: value' here"]),
    "variable in a flow mapping": ("a: {b: ${C}}\n", [
        '1:9: a variable inside [ ] or { } must be in quotes: "${NAME}"']),
    "deep": ("a: " + "[" * 100, ["1:35: nested more than 32 levels deep"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_YAML)
def test_compose_invalid_yaml_is_rejected(name: str) -> None:
    text, messages = BAD_YAML[name]
    assert rejections(text) == messages


def test_compose_unclosed_quote_or_bracket_is_rejected() -> None:
    for text in ('a: "b\n', "a: [1, 2\n", "a: {b: 1\n", "a: 'b\n", "- a\nb: 1\n", "a: @b\n", "%FOO\n"):
        (message,) = rejections(text)
        assert "is not YAML" in message


BOMBS = {
    "lol": "a0: &a0 [x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"a{i}: &a{i} [{','.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "merge": "a0: &a0 {k: [x,x,x,x,x,x,x,x,x]}\n"
    + "".join(f"a{i}: &a{i} {{{','.join(f'k{j}: *a{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)),
    "deep aliases": "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 5000)),
    "deep flow": "[" * 2_000_000,
    "deep mapping": "{a: " * 500_000,
    "deep block": "".join(" " * i + "a:\n" for i in range(2000)),
    "deep dashes": "- " * 1_000_000,
    "deep question marks": "? " * 1_000_000,
    "many nodes": "a: [" + "x," * 1_000_000 + "]\n",
    "many duplicates": "a: 1\n" * 800_000,
    "many keys": "".join(f"k{i}:\n" for i in range(400_000)),
    "many anchors": "".join(f"- &a{i} x\n" for i in range(300_000)),
    "many directives": "%TAG !a! b\n" * 300_000 + "--- a\n",
    "late directives": "a: 1\n...\n" + "%TAG !a! b\n" * 300_000 + "--- a\n",
    "many documents": "---\n" * 1_000_000,
    "open quote": '"' + "a\n" * 1_900_000,
    "comments": "#\n" * 2_000_000,
    "long line": "a: " + "b " * 2_000_000 + ": c\n",
    "empty flow": "[[],{}," * 400_000,
}


@pytest.mark.parametrize("name", BOMBS)
def test_compose_bomb_is_rejected_within_a_second(name: str) -> None:
    text = BOMBS[name]
    assert len(text) <= MAX_FILE_BYTES + 100_000
    start = time.process_time()
    messages = rejections(text)
    assert time.process_time() - start < 1.0 * slowdown()
    assert len(messages) <= 101
    assert sum(len(message) for message in messages) < 50_000


def test_compose_accepts_the_maximum_of_values() -> None:
    assert len(read("a: [" + ",".join(["1"] * (MAX_NODES - 3)) + "]")["a"]) == MAX_NODES - 3


def file_problem(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        compose(read_source(path, path.name))
    (problem,) = caught.value.problems
    return str(problem)


def test_read_source_big_file_is_rejected_unread(tmp_path: Path) -> None:
    path = tmp_path / "big.yaml"
    with path.open("wb") as stream:
        stream.truncate(50 * 1024 * 1024)
    tracemalloc.start()
    start = time.process_time()
    message = file_problem(path)
    took_s = time.process_time() - start
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert message == "big.yaml: is 52428800 bytes long: a configuration file may have 4194304 at most"
    assert took_s < 0.2
    assert peak_bytes < 2**20


BAD_FILES = {
    "invalid UTF-8": (
        b"a: 1\nb: \xff\n",
        "f.yaml:2:4: byte 0xff is not valid UTF-8: save the file as UTF-8\n    b: \n       ^",
    ),
    "Latin-1": (
        "a: ü".encode("latin-1"),
        "f.yaml:1:4: byte 0xfc is not valid UTF-8: save the file as UTF-8\n    a: \n       ^",
    ),
    "UTF-16": ("a: 1".encode("utf-16"), "f.yaml:1:1: is UTF-16 (save the file as UTF-8)"),
    "control character": (b"a: 1\nb: \x07\n", "f.yaml:2:4: the control character U+0007 is not allowed here"),
    "NUL": (b"\x00" * 10, "f.yaml:1:1: the control character U+0000 is not allowed here"),
    "escape": (b"a: \x1b[31m\n", "f.yaml:1:4: the control character U+001B is not allowed here"),
    "directive": (
        b"%TAG ! x\n--- a\n",
        "f.yaml:1:1: YAML directives are not supported (remove this line)\n    %TAG ! x\n    ^",
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_read_source_invalid_bytes_are_rejected(name: str, tmp_path: Path) -> None:
    raw, message = BAD_FILES[name]
    path = tmp_path / "f.yaml"
    path.write_bytes(raw)
    assert file_problem(path) == message


def test_read_source_accepts_bom_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "f.yaml"
    path.write_bytes(b"\xef\xbb\xbfa: 1\r\nb: 2\r\n")
    root = compose(read_source(path, "f.yaml"))
    assert plain(root) == {"a": 1, "b": 2}
    assert (root.value["a"].key_line, root.value["a"].key_column, root.value["b"].key_line) == (1, 1, 2)


def test_read_source_not_a_file_is_rejected(tmp_path: Path) -> None:
    assert file_problem(tmp_path) == f"{tmp_path.name}: is a folder, not a file"
    assert file_problem(tmp_path / "no.yaml") == "no.yaml: there is no such file"
    os.mkfifo(tmp_path / "pipe.yaml")
    assert file_problem(tmp_path / "pipe.yaml") == "pipe.yaml: is not a regular file"
    (tmp_path / "f.yaml").write_text("a: 1")
    assert file_problem(tmp_path / "f.yaml" / "x.yaml") == "x.yaml: cannot be read: Not a directory"


@given(st.text(alphabet=st.sampled_from(list("ab:-[]{},&*!|>'\"%@`#? \n\t$0.~<")), max_size=60))
def test_compose_any_text_is_read_or_rejected(text: str) -> None:
    messages = ["a message"]
    try:
        read(text)
    except ConfigError as error:
        messages = [problem.message for problem in error.problems]
    assert messages
    assert not any("\n" in message for message in messages)


@given(st.binary(max_size=60))
def test_read_source_any_bytes_are_read_or_rejected(tmp_path_factory: pytest.TempPathFactory, raw: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(raw)
    problems = 1
    try:
        plain(compose(read_source(path, "any.yaml")))
    except ConfigError as error:
        problems = len(error.problems)
    assert problems


@pytest.mark.parametrize("name", [*BAD_YAML])
def test_pure_python_parser_rejects_the_same(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "_Loader", yaml.SafeLoader)
    text, messages = BAD_YAML[name]
    assert [message.split(":")[0] for message in rejections(text)] == [message.split(":")[0] for message in messages]


def test_pure_python_parser_reads_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    text = Path(__file__).with_name("contract.yaml").read_text("utf-8")
    fast = read(text)
    monkeypatch.setattr(parser, "_Loader", yaml.SafeLoader)
    assert read(text) == fast
