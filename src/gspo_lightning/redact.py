"""Secrets stay out of what a run writes and shows: ``config.yaml``, the report, the screen, error lines."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections.abc import Iterable
from typing import Any, TextIO, cast

from gspo_lightning.screen import visible

MASK = "***"
_SHORT = 6
"""A value of fewer characters is looked for under its own key alone: it may be a word that stands anywhere."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_ALWAYS = (
    "secret", "secrets", "password", "passwords", "passwd", "passphrase", "credential", "credentials", "apikey",
    "apikeys", "authorization", "bearer",
)  # fmt: skip
"""Ends of words, for ``PGPASSWORD``."""
_BEHIND_ANOTHER = {"pass", "pat", "pwd"}
"""Not by themselves: ``PWD`` is a folder."""
_ISSUERS = {
    "access", "api", "auth", "bearer", "github", "gitlab", "hf", "hub", "huggingface", "openai", "private", "refresh",
    "session", "ssh", "wandb",
}  # fmt: skip
"""Before a plural: ``hf_tokens`` is a list of secrets, ``max_tokens`` is a number."""
_PASSWORD_IN_URL = re.compile(r"""(://[^\s/@:'"]*:)[^\s/'"]+@""")
_VOCABULARY = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "vision", "start", "end", "stop"}
"""``eos_token`` is no secret, and neither is ``token_id``."""


def redacted(plain: Any) -> Any:
    """A copy with ``***`` for the values of keys that name a secret, for values of such environment variables, and for
    the password in ``https://user:password@host``."""
    return _redacted(plain, _known())


def masked(line: str) -> str:
    """A line of text, fit for a terminal, with ``***`` for each secret of the environment and of the command line, and
    for passwords in addresses."""
    return visible(_masked(line, _known()))


def masked_stderr() -> contextlib.redirect_stderr[TextIO]:
    """A context in which secrets are masked in what is written to ``sys.stderr``, whoever writes."""
    return contextlib.redirect_stderr(cast("TextIO", _MaskedStream(sys.stderr)))


class _MaskedStream:
    """Masks what is written; in all else the stream itself."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_masked(text, _known()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def names_a_secret(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret: ``HF_TOKEN``, ``openai_key``, ``MySecret2``."""
    words = [word.lower() for word in _WORD.findall(name)]
    while words and (words[-1].isdigit() or words[-1] == "value"):
        words.pop()
    if not words:
        return False
    if any(word.endswith(_ALWAYS) for word in words):
        return words[-1] not in {"env", "file", "path"}
    before = words[-2] if len(words) > 1 else ""
    if words[-1] in {"keys", "tokens"}:
        return before in _ISSUERS
    if words[-1] in _BEHIND_ANOTHER:
        return before != ""
    return words[-1] == "key" or (words[-1] == "token" and before not in _VOCABULARY)


def _known() -> list[str]:
    given = (argument.lstrip("+~").split("=", 1) for argument in sys.argv[1:] if "=" in argument)
    pairs = [*os.environ.items(), *((key.rpartition(".")[2], value.strip("'\"")) for key, value in given)]
    return sorted(
        {value for name, value in pairs if names_a_secret(name) and len(value) >= _SHORT}, key=len, reverse=True
    )


def _redacted(node: Any, known: list[str], secret: bool = False) -> Any:
    if isinstance(node, dict):
        return {k: _redacted(v, known, secret or names_a_secret(str(k))) for k, v in node.items()}
    if isinstance(node, list):
        return [_redacted(item, known, secret) for item in node]
    if secret and node not in ("", None) and not isinstance(node, bool):
        return MASK
    return _masked(node, known) if isinstance(node, str) else node


def _masked(text: str, known: Iterable[str]) -> str:
    for value in known:
        text = text.replace(value, MASK)
    return _PASSWORD_IN_URL.sub(rf"\1{MASK}@", text)
