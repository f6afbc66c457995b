"""Text for a screen: counts in words, and text from elsewhere made safe for a terminal."""

from __future__ import annotations

_SIGNS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """The text with visible signs for control characters, except line feeds and tabs.

    A terminal obeys control characters: they clear it, rename it, hide output, or make links. Text of a dataset, a
    model, a server or somebody else's config passes through here on its way to the screen.
    """
    return text.translate(_SIGNS)


def counted(count: int, one: str, several: str = "") -> str:
    """``1 rollout`` or ``2 rollouts``: the count and the noun in its number; by default the plural has an ``s``."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"
