"""Makes text from elsewhere safe for a terminal."""

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
