"""Words that readers stumble over, on the pages that have been freed of them; and what a shell stumbles over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [
    "coming-from", "data", "design", "distributed", "faults", "gpt_oss", "internals", "metrics", "models", "multi_turn", "performance", "quickstart",
    "reuse", "rewards", "rollouts", "safety", "sweeps", "troubleshooting", "vision", "../README", "../CONTRIBUTING", "objectives/README",
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


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "page", [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))], ids=lambda p: p.stem
)
def test_commands_can_be_pasted_into_zsh(page):
    """It takes no comment after a command, and a quote in a comment line opens a string."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    lines = [line for block in blocks for line in block.splitlines()]
    assert [line for line in lines if re.search(r"\S\s+#\s", line)] == []
    assert [line for line in lines if line.startswith("#") and re.search(r"['\"`;]", line)] == []
    assert [line for line in lines if re.search(r"=\[[^']*$", line) and "'" not in line] == []  # brackets are patterns
