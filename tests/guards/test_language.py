"""The language of the project: words that docs, docstrings, comments and messages do not use.

Invariants:
- The list holds words of an old private idiom that have a plain, usual replacement.
- Checked: pages, YAML files, scripts and service files as a whole; comments and string constants of Python files.
"""

from __future__ import annotations

import ast
import io
import re
import subprocess
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# Word → the word to use instead.
WORDS = {
    "absent": "missing",
    "anew": "again",
    "beside": "next to, or besides",
    "heed": "obey, or handle",
    "heeded": "obeyed, or handled",
    "lest": "so that … not",
    "nobody": "no one; name the actor",
    "said": "reported, or printed",
    "stands": "is",
    "told": "reported, or passed",
    "whoever": "name the actor",
    "wish": "request, or desired state",
    "wishes": "requests, or desired state",
}
_WORD = re.compile(r"(?<![\w`'\".-])(" + "|".join(WORDS) + r")(?![\w-])")
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
EXEMPT = frozenset(
    {"tests/guards/test_language.py", "examples/mac-studio.d/entities.yaml"}
)  # a list of words; prompts as data


def tracked(*patterns: str) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    return [ROOT / name for name in names if name not in EXEMPT and (ROOT / name).is_file()]


def words_in(text: str) -> list[str]:
    """Return the words of the list in a text, code in backticks and the Unix user left out."""
    return _WORD.findall(_CODE.sub("", text).replace("user: nobody", ""))


def found_in_python(source: str) -> list[tuple[int, str]]:
    """Return (line, word) for comments and string constants of a module."""
    found = [
        (token.start[0], word)
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
        for word in words_in(token.string)
    ]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value:
            found += [(node.lineno, word) for word in words_in(node.value)]
    return sorted(found)


def found_in_text(text: str) -> list[tuple[int, str]]:
    fenced, found = False, []
    for number, line in enumerate(text.splitlines(), 1):
        if line.lstrip().startswith("```"):
            fenced = not fenced
        elif not fenced:
            found += [(number, word) for word in words_in(line)]
    return found


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", tracked("*.py"), ids=name_of)
def test_python_file_uses_plain_words(path: Path) -> None:
    assert found_in_python(path.read_text("utf-8")) == []


@pytest.mark.parametrize(
    "path",
    tracked("*.md", "*.yaml", "Makefile", "*.sh", ".ci/run", "systemd/*", "launchd/*", "fleetd/cli/templates/*"),
    ids=name_of,
)
def test_page_uses_plain_words(path: Path) -> None:
    assert found_in_text(path.read_text("utf-8")) == []


def test_word_check_finds_a_word_and_spares_code() -> None:
    assert found_in_python('x = "it is told so"  # anew\n') == [(1, "anew"), (1, "told")]
    assert found_in_python("x = 'told'\n") == []
    assert found_in_text("a `told` b\n```\ntold\n```\nit stands\n") == [(5, "stands")]
