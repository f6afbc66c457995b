"""Words that readers stumble over, on the pages that have been freed of them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "coming-from", "data", "design", "distributed", "faults", "gpt_oss", "metrics", "models", "multi_turn", "performance", "quickstart",
    "rewards", "rollouts", "safety", "sweeps", "vision", "../README",
]  # fmt: skip
WORDS = {
    r"\bbehind\b": "after, below, with",
    r"\b(go|goes) on\b": "continue, resume, be active",
    r"\b(as|so) many (?!as\b)": "the number itself, or 'this many' next to it",
    r"\banew\b": "again",
    r"\bin hand\b": "current, available",
    r"\bbeside\b": "next to, compared with, during",
    r"\bdearer\b": "more expensive",
    r"\bmended\b": "fixed",
    r"\bwithout signal\b": "silent",
}
"""Pattern -> what to write instead."""


@pytest.mark.parametrize("page", PAGES)
def test_a_page_has_none_of_them(page):
    text = re.sub(r"^```.*?^```", "", (DOCS / f"{page}.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    found = {
        match[0]: instead for word, instead in WORDS.items() for match in re.finditer(word, text.replace("\n", " "))
    }
    assert found == {}
