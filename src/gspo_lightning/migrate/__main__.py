"""`python scripts/from_trl.py config.yaml`: the command and YAML that equal a TRL GRPOConfig, and a verdict per key."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gspo_lightning.errors import UserError
from gspo_lightning.migrate.convert import Conversion, convert
from gspo_lightning.migrate.parse import parse_config, parse_lora, parse_unread
from gspo_lightning.program.redact import masked, redacted
from gspo_lightning.screen import escape_what_no_screen_shows, visible

NOT_IN_TRL = {
    "model": ("path", "model.path"),
    "data": ("rows", "data.task.source"),
}
"""Config group -> its choice, and the key for what a GRPOConfig does not contain."""
_PLAIN = set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-./")


def main(arguments: Sequence[str] | None = None, console: Console | None = None) -> int:
    """Prints verdicts, command and YAML; 1 if a key that changes the result has no counterpart, 2 on bad input."""
    parser = argparse.ArgumentParser(
        prog="from_trl.py", description="Translates a TRL GRPOConfig into a gspo_lightning command."
    )
    parser.add_argument("config", help="a JSON, YAML or Python file with the config; - reads standard input")
    parser.add_argument("--ranks", type=int, default=1, help="processes of the TRL run (default: 1)")
    parser.add_argument("--model", default="my/model", help="folder or hub name of the model")
    parser.add_argument("--data", default="prompts.jsonl", help="file or hub name of the prompts")
    parser.add_argument("--reward", default="last_integer", help="a choice of the group reward")
    parser.add_argument("--output", type=Path, help="write the YAML there, such as conf/experiment/mine.yaml")
    options = parser.parse_args(arguments)
    escape_what_no_screen_shows()
    console = console or Console()
    try:
        text = _read(options.config)
        result = convert(parse_config(text), ranks=options.ranks, adapter=parse_lora(text))
        result.unread = parse_unread(text)
        result.groups |= {group: choice for group, (choice, _) in NOT_IN_TRL.items()} | {"reward": options.reward}
        result.settings |= {"model.path": options.model, "data.task.source": options.data}
    except UserError as error:
        print(f"error: {masked(str(error))}", file=sys.stderr)
        return 2
    console.print(verdict_table(result))
    for line in result.added:
        _say(console, f"added: {line}")
    for line in result.unread:
        _say(console, _not_read(line))
    if result.blocking:
        print(f"error: {', '.join(result.blocking)} would change the result and cannot be expressed", file=sys.stderr)
        return 1
    _say(console, "added: a GRPOConfig does not contain model, data and reward\n")
    _say(console, command(result))
    _say(console, f"\n{experiment_yaml(result)}")
    return _write(options.output, experiment_yaml(result)) if options.output else 0


def _not_read(line: str) -> str:
    return masked(f"not read, what it may set is missing here: {line}")


def _say(console: Console, text: str) -> None:
    console.print(visible(text), highlight=False, markup=False, soft_wrap=True)


def _write(path: Path, text: str) -> int:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        print(f"error: --output {path}: cannot write there ({error.strerror}); name a file", file=sys.stderr)
        return 2
    return 0


def verdict_table(result: Conversion) -> Table:
    """One row per key that was given."""
    table = Table(title="GRPOConfig, key by key", title_justify="left")
    for column in ("key", "value", "verdict", "here, or why not"):
        table.add_column(column, overflow="fold")
    for verdict in result.verdicts:
        value = str(redacted({verdict.key: verdict.value})[verdict.key])
        table.add_row(verdict.key, *(escape(visible(cell)) for cell in (value, verdict.kind, verdict.note)))
    return table


def overrides(result: Conversion) -> list[str]:
    """Hydra overrides: groups first, then settings."""
    groups = [f"{group}={choice}" for group, choice in sorted(result.groups.items())]
    return groups + [f"{key}={_spell(value)}" for key, value in sorted(result.settings.items(), key=_by_name)]


def command(result: Conversion) -> str:
    """The command line, ready for a shell."""
    return "python train.py \\\n  " + " \\\n  ".join(map(shlex.quote, overrides(result)))


def experiment_yaml(result: Conversion) -> str:
    """The conversion as a file for ``conf/experiment``."""
    tree = OmegaConf.create({})
    for key, value in sorted(result.settings.items(), key=_by_name):
        OmegaConf.update(tree, key.lstrip("+"), value, force_add=True)
    head = "".join(f"  - override /{group}: {choice}\n" for group, choice in sorted(result.groups.items()))
    lines = [*result.added, *map(_not_read, result.unread)]
    notes = "".join(f"# {line}\n" for line in lines)
    return f"# @package _global_\n{notes}defaults:\n{head}\n{OmegaConf.to_yaml(tree)}"


def _by_name(item: tuple[str, Any]) -> str:
    return item[0].lstrip("+")


def _spell(value: Any) -> str:
    """A value in Hydra's grammar."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(_spell, value)) + "]"
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_spell(item)}" for key, item in value.items()) + "}"
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    if set(text) <= _PLAIN and text.lower() not in ("null", "true", "false", ""):
        return text
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


def _read(name: str) -> str:
    try:
        if name == "-":
            return sys.stdin.buffer.read().decode("utf-8")
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: cannot read the file ({error})") from error


if __name__ == "__main__":
    sys.exit(main())
