"""Keeps secrets out of what a run writes and shows: ``config.yaml``, the report, the screen, error lines."""

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
"""A value of fewer characters is masked only under its own key: elsewhere it may be an ordinary word."""
_WORD = re.compile(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])|\d+")
_ALWAYS = ("secret", "password", "passwd", "passphrase", "credential", "apikey", "authorization", "bearer")
"""Endings of words that always name a secret, as in ``PGPASSWORD``."""
_ABBREVIATIONS = {"pass", "pat", "pwd"}
_ISSUERS = {
    "access", "api", "auth", "bearer", "github", "gitlab", "hf", "hub", "huggingface", "openai", "private", "refresh",
    "session", "ssh", "wandb",
}  # fmt: skip
"""Words before the plural of a secret: ``hf_tokens`` is a list of secrets, ``max_tokens`` is a number."""
_ACCOUNTS = _ISSUERS | {
    "admin", "aws", "azure", "database", "databricks", "db", "devops", "docker", "email", "ftp", "gh", "ghcr", "git",
    "http", "https", "imap", "keystore", "ldap", "login", "mail", "mongo", "mongodb", "mqtt", "mysql", "pg", "postgres",
    "postgresql", "proxy", "rabbitmq", "redis", "registry", "root", "smtp", "sql", "sudo", "user", "vpn",
}  # fmt: skip
"""Words before an abbreviation: ``DB_PASS`` is a secret; ``first_pass``, ``file_pat`` and ``HOST_PWD`` are not."""
_PASSWORD_IN_URL = re.compile(r"""(://[^\s/@:'"]*:)(?!\d{1,5}[,?#])[^\s/'"]+@(?!sha\d+:)""")
"""Not the port in ``http://host:80?to=me@host``, nor the version in ``docker://image:1@sha256:0f3c``."""
_VOCABULARY = {"eos", "bos", "pad", "unk", "sep", "cls", "mask", "image", "video", "vision", "start", "end", "stop"}
"""Words before ``token`` that make it no secret, as in ``eos_token``. ``token_id`` is none either."""
_NAMED = {
    "answer", "audio", "cache", "category", "choice", "class", "column", "completion", "content", "context",
    "dict", "end", "example", "field", "fn", "foreign", "gold", "group", "id", "image", "index", "input", "json",
    "label", "lookup", "mask", "message", "metric", "name", "option", "output", "partition", "primary", "problem",
    "prompt", "public", "query", "question", "reasoning", "response", "reward", "role", "row", "sample", "score",
    "solution", "sort", "split", "start", "target", "task", "text", "truth", "unique", "video",
}  # fmt: skip
"""Words before ``key`` that make it the name of something, as in ``answer_key``. Any other key may be a secret,
as its issuer can have any name; and so may any variable of the environment: ``COSMOS_PRIMARY_KEY`` and
``SEARCH_QUERY_KEY`` are secrets of a cloud service."""


def redacted(plain: Any) -> Any:
    """A copy with ``***`` for the values of keys and environment variables that name a secret, and for the password in
    ``https://user:password@host``."""
    return _redacted(plain, _known())


def masked(line: str) -> str:
    """A line of text, safe for a terminal, with ``***`` for each secret of the environment and of the command line, and
    for passwords in addresses."""
    return visible(_masked(line, _known()))


def masked_stderr() -> contextlib.redirect_stderr[TextIO]:
    """A context in which secrets are masked in what is written to ``sys.stderr``, whoever writes."""
    return contextlib.redirect_stderr(cast("TextIO", _MaskedStream(sys.stderr)))


class _MaskedStream:
    """A stream that masks what is written and passes everything else to the wrapped stream."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        return self._stream.write(_masked(text, _known()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def names_a_secret(name: str) -> bool:
    """Whether a key or a variable of this name holds a secret: ``HF_TOKEN``, ``openai_key``, ``MySecret2``."""
    before, last = ["", "", *(words := _words(name))][-2:]
    if any(word.removesuffix("s").endswith(_ALWAYS) for word in words):
        return last not in {"env", "file", "path"}
    if last in {"keys", "tokens"}:
        return before in _ISSUERS
    if last in _ABBREVIATIONS:
        return before in _ACCOUNTS
    if last == "key":
        is_of_a_service = before == "primary" and len(_words(name)) > 2  # as in cosmos_primary_key
        return name.isupper() or is_of_a_service or _NAMED.isdisjoint({before, before.removesuffix("s")})
    return last == "token" and before not in _VOCABULARY


def _names_a_password(name: str) -> bool:
    """Whether even a number under this name is a secret; under others it is a setting, as in ``session_tokens``."""
    words = _words(name)
    return bool(words) and words[-1].endswith(_ALWAYS)


def _words(name: str) -> list[str]:
    words = [word.lower() for word in _WORD.findall(name)]
    while words and (words[-1].isdigit() or words[-1] == "value"):
        words.pop()
    return words


def _known() -> list[str]:
    """Secrets of the environment and the command line, longest first."""
    secret = {value for name, value in os.environ.items() if names_a_secret(name) and not _is_folder(name, value)}
    for argument in sys.argv[1:]:
        key, _, value = argument.lstrip("+~").partition("=")
        name, value = key.rpartition(".")[2], value.strip("'\"")
        if names_a_secret(name) and (_names_a_password(name) or not _is_number(value)):
            secret.add(value)
    return sorted((value for value in secret if len(value) >= _SHORT), key=len, reverse=True)


def _is_folder(name: str, value: str) -> bool:
    return name.lower().endswith("pwd") and os.path.isabs(value) and os.path.isdir(value)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _redacted(node: Any, known: list[str], secret: str = "") -> Any:
    """`redacted` with the known secrets; ``secret`` is the nearest key above the node that names one, if any."""
    if isinstance(node, dict):
        return {k: _redacted(v, known, str(k) if names_a_secret(str(k)) else secret) for k, v in node.items()}
    if isinstance(node, list):
        return [_redacted(item, known, secret) for item in node]
    if isinstance(node, bool) or node in ("", None):
        return node
    if secret and (isinstance(node, str) or _names_a_password(secret)):
        return MASK
    return _masked(node, known) if isinstance(node, str) else node


def _masked(text: str, known: Iterable[str]) -> str:
    for value in known:
        text = text.replace(value, MASK)
    return _PASSWORD_IN_URL.sub(rf"\1{MASK}@", text)
