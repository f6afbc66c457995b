"""Text files are UTF-8 in every locale: Python before 3.15 reads and writes them in that of the system."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OTHERS = ("os.open", "Image.open", "av.open")
"""They have the name and open no text."""


def without_encoding(source: str) -> list[str]:
    """Calls that read or write a text file and do not name its encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or ast.unparse(node.func) in OTHERS:
            continue
        name = ast.unparse(node.func).rpartition(".")[2]
        strings = [a.value for a in [*node.args, *(k.value for k in node.keywords)] if isinstance(a, ast.Constant)]
        is_binary = name in ("open", "fdopen") and any(isinstance(s, str) and "b" in s and len(s) < 4 for s in strings)
        is_named = any(keyword.arg == "encoding" for keyword in node.keywords)
        if name in ("open", "fdopen", "read_text", "write_text") and not is_binary and not is_named:
            found.append(f"{node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize(
    ("call", "count"),
    [
        ("open(path)", 1),
        ("path.open('a')", 1),
        ("os.fdopen(number, 'w')", 1),
        ("(a / b).read_text()", 1),
        ("path.write_text('b')", 1),
        ("path.read_text(encoding='utf-8')", 0),
        ("open(path, mode='rb')", 0),
        ("path.open('ab')", 0),
        ("os.open(path, 0)", 0),
    ],
)
def test_a_call_without_its_encoding_is_seen(call: str, count: int) -> None:
    assert len(without_encoding(call)) == count


def test_every_text_file_of_the_package_has_its_encoding() -> None:
    files = [*(ROOT / "src").rglob("*.py"), ROOT / "train.py", ROOT / "evaluate.py"]
    assert len(files) > 100
    found = {str(file.relative_to(ROOT)): without_encoding(file.read_text(encoding="utf-8")) for file in files}
    assert {name: calls for name, calls in found.items() if calls} == {}
