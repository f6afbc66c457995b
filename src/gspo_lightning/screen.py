"""What others wrote, fit for a terminal."""

from __future__ import annotations

_SIGNS = {
    **{code: chr(0x2400 + code) for code in range(0x20) if chr(code) not in "\n\t"},
    0x7F: "\u2421",
    **{code: f"\\x{code:02x}" for code in range(0x80, 0xA0)},
}


def visible(text: str) -> str:
    """A text with signs for control characters, but for ends of lines and tabs.

    A terminal obeys them: they clear it, rename it, hide what was said, or make links. Whatever a dataset, a model, a
    server or a config of somebody else says passes through here on its way to the screen.
    """
    return text.translate(_SIGNS)
