"""The figures of the structure count what they claim to count."""

from __future__ import annotations

import ast

import pytest

from tests.support.structure import Walk, passes_on, summarize


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("def f(self, a):\n    '''Doc.'''\n    return self.x.g(a, 1)", True),
        ("async def f(self, a):\n    await self.x.g(a, *self.rest, key=a)", True),
        ("def f(self, a):\n    return self.x.g(a + 1)", False),
        ("def f(self, a):\n    b = a\n    return self.x.g(b)", False),
        ("def f(self):\n    return self.x", False),
    ],
)
def test_passes_on_finds_functions_with_one_call(source: str, expected: bool) -> None:
    assert passes_on(ast.parse(source).body[0]) is expected


def test_summarize_counts_moves_between_files_only() -> None:
    calls = [[None, "a", 1], ["a", "a", 5], ["a", "b", 2], ["b", "c", 3]]
    assert summarize(calls, {("b", 2), ("a", 5)}) == Walk(files=3, moves=2, passing=1)
