"""Every mistake has its place and its sentence: the table in bad_configs.txt, and what a table cannot say."""

from __future__ import annotations

import random
import time
from pathlib import Path

import pytest

from fleetd.config.load import load
from fleetd.errors import ConfigError, Problem

TABLE = Path(__file__).with_name("bad_configs.txt")
ENV = {"SECRET": "hunter2", "TOKEN": "sk 1234567890!"}


def cases() -> list[tuple[str, list[str]]]:
    found = []
    for block in TABLE.read_text("utf-8").split("\n\n")[1:]:
        lines = block.splitlines()
        text = [line for line in lines if not line.startswith("    => ")]
        found.append(("\n".join(text) + "\n", [line[7:] for line in lines if line.startswith("    => ")]))
    return found


def problems(folder: Path, text: str) -> tuple[Problem, ...]:
    path = folder / "fleet.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(path, ENV)
    return caught.value.problems


def lines(found: tuple[Problem, ...]) -> list[str]:
    return [f"{one.line}:{one.column}: " + (f"{one.path}: " if one.path else "") + one.message for one in found]


def test_table_of_cases_is_complete() -> None:
    assert len(cases()) > 150
    assert all(messages for _, messages in cases())


@pytest.mark.parametrize(("text", "messages"), cases())
def test_load_mistake_is_reported_at_its_place(text: str, messages: list[str], tmp_path: Path) -> None:
    assert lines(problems(tmp_path, text)) == messages


def test_problem_prints_its_line_and_a_caret(tmp_path: Path) -> None:
    (problem,) = problems(tmp_path, "models:\n  coder:\n    engine: vllm\n    memory: 10G  # too little\n")
    assert str(problem) == (
        f"{tmp_path / 'fleet.yaml'}:4:13: models.coder.memory: invalid size '10G': ambiguous unit (try 10GiB or 10GB)\n"
        "        memory: 10G  # too little\n"
        "                ^"
    )


def test_problem_shows_the_path_as_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("fleet.yaml").write_text("version: 2\ninclude: parts/*.yaml\n")
    Path("parts").mkdir()
    Path("parts/a.yaml").write_text("services: 7\n")
    with pytest.raises(ConfigError) as caught:
        load(Path("fleet.yaml"), {})
    assert [one.file for one in caught.value.problems] == ["fleet.yaml", "parts/a.yaml"]


def test_load_mistakes_follow_the_order_of_files(tmp_path: Path) -> None:
    (tmp_path / "b.yaml").write_text("models:\n  x: {engine: vllm, memory: 1G}\n  y: {engine: vllm, ttl: 5}\n")
    (tmp_path / "c.yaml").write_text("a: [\n")
    text = "include: [b.yaml, c.yaml]\nservices:\n  s: {command: x, port: 0}\nname: 7\n"
    found = problems(tmp_path, text)
    assert [(Path(one.file).name, one.line) for one in found] == [
        ("fleet.yaml", 3),
        ("fleet.yaml", 4),
        ("b.yaml", 2),
        ("b.yaml", 3),
        ("c.yaml", 2),
    ]


def test_load_mistake_in_an_anchor_is_reported_once(tmp_path: Path) -> None:
    text = "services:\n  a: &a {command: x, stop: {timeout: 5}}\n  b: *a\n  c: {<<: *a, port: 3000}\n"
    assert lines(problems(tmp_path, text)) == [
        "2:38: services.a.stop.timeout: invalid duration 5: no unit (try 5s or 5ms)"
    ]


@pytest.mark.parametrize(
    "text",
    [
        "services: {a: {command: x, port: '${TOKEN}'}}\n",
        "services: {a: {command: x, max_age: '${TOKEN}'}}\n",
        "services: {a: {command: x, '${TOKEN}': 1, limits: {memory: 'x${TOKEN}y'}}}\n",
        "services: {a: {command: x, depends_on: ['${TOKEN}']}}\n",
        "models: {m: {instance: '${TOKEN}'}}\n",
        "models: {m: {engine: vllm, memory: {gpu0: '${TOKEN}'}}}\n",
        "models: {m: {engine: vllm, aliases: ['${TOKEN} ${TOKEN}']}}\n",
        "models: {m: {engine: '${TOKEN}'}}\n",
        "gateway: {listen: '${TOKEN}'}\n",
        "include: '${TOKEN}'\n",
    ],
)
def test_problem_never_contains_the_value_of_a_variable(text: str, tmp_path: Path) -> None:
    assert not any(ENV["TOKEN"] in str(one) for one in problems(tmp_path, text))


def test_load_five_thousand_mistakes_is_quick(tmp_path: Path) -> None:
    text = "models:\n" + "".join(f"  m{i}: {{instance: olama, memory: 10G, fallback: m}}\n" for i in range(5000))
    start = time.process_time()
    found = problems(tmp_path, text)
    assert len(found) == 15_000
    assert time.process_time() - start < 4


def test_load_mutated_file_is_loaded_or_rejected(tmp_path: Path) -> None:
    seed = TABLE.read_text("utf-8").replace("=>", "")
    random_source = random.Random(7)
    blocks = [text for text, _ in cases()]
    for _ in range(150):
        text = list(random_source.choice(blocks))
        for _ in range(random_source.randint(1, 6)):
            text[random_source.randrange(len(text))] = random_source.choice(seed)
        path = tmp_path / "fleet.yaml"
        path.write_text("".join(text), encoding="utf-8")
        try:
            assert load(path, ENV).config
        except ConfigError as error:
            assert error.problems  # noqa: PT017 - either outcome is right, an empty refusal is not


def test_problem_contains_no_control_characters(tmp_path: Path) -> None:
    text = 'services: {"\\e[31mred\\n": {command: x, depends_on: ["\\e[2J"]}}\nmodels: {m: {engine: vllm, aliases: ["\\e[2J"]}}\n'
    for problem in problems(tmp_path, text + f"? {'k' * 200_000}\n: 1\n"):
        head = str(problem).splitlines()[0]
        assert head.isprintable()
        assert len(head) < 3000
