"""Text for a screen: counts in words, and text from elsewhere made safe for a terminal."""

from __future__ import annotations

import io
import os
import select
import sys

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


def escape_what_no_screen_shows() -> None:
    """Lets standard output show an escape for what its encoding lacks (``\\xb1``), as standard error does.

    Else a letter of a dataset, a model or a path ends a program where the locale is not UTF-8, and half a character
    does anywhere.
    """
    # surrogateescape: of Python itself in the locales C and POSIX, as in a container
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors in ("strict", "surrogateescape"):
        sys.stdout.reconfigure(errors="backslashreplace")


def say(text: str) -> None:
    """Prints a line in the handler of a signal, which may have come in the middle of another print.

    Python lets no print into the buffer of one that it has interrupted; the line goes past it then.
    """
    try:
        print(text, flush=True)
    except RuntimeError:
        os.write(sys.stdout.fileno(), f"{text}\n".encode(errors="backslashreplace"))


def has_no_reader() -> bool:
    """Whether standard output is a pipe whose reader has gone, as after ``| head``; then what is printed goes nowhere.

    Else Python would complain once more at its end, when it writes what is left.
    """
    try:
        output = sys.stdout.fileno()
    except (OSError, ValueError):  # no file, such as a notebook's
        return False
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, output)
    os.close(nowhere)
    return True


def counted(count: int, one: str, several: str = "") -> str:
    """``1 rollout`` or ``2 rollouts``: the count and the noun in its number; by default the plural has an ``s``."""
    return f"{count} {one if count == 1 else several or f'{one}s'}"
