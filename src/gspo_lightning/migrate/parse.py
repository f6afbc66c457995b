"""Reads a GRPOConfig from JSON, YAML, or Python keyword arguments. No code is ever executed."""

from __future__ import annotations

import ast
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from gspo_lightning.errors import UserError
from gspo_lightning.migrate.names import names_at, value_of
from gspo_lightning.migrate.scopes import home_of, scopes_around
from gspo_lightning.migrate.unread import unread

_OF_OTHERS = (
    "AdaLoraConfig", "BOFTConfig", "IA3Config", "LoHaConfig", "LoKrConfig", "LoftQConfig", "LoraConfig",
    "LoraRuntimeConfig", "OFTConfig", "PeftConfig", "PrefixTuningConfig", "PromptEncoderConfig", "PromptTuningConfig",
    "VeraConfig", "XLoraConfig",
    "AqlmConfig", "AutoRoundConfig", "AwqConfig", "BitsAndBytesConfig", "CompressedTensorsConfig", "EetqConfig",
    "FbgemmFp8Config", "FineGrainedFP8Config", "GPTQConfig", "HqqConfig", "Mxfp4Config", "QuantoConfig",
    "TorchAoConfig",
    "AutoConfig", "CompileConfig", "GenerationConfig", "PretrainedConfig", "PreTrainedConfig",
    "BCOConfig", "CPOConfig", "DPOConfig", "GKDConfig", "KTOConfig", "ModelConfig", "NashMDConfig", "ORPOConfig",
    "OnlineDPOConfig", "PPOConfig", "PRMConfig", "RLOOConfig", "RewardConfig", "SFTConfig", "XPOConfig",
)  # fmt: skip
"""Configs of peft, Transformers and TRL that stand in scripts beside that of the trainer."""


def parse_config(text: str) -> dict[str, Any]:
    """The keys and values of a config.

    A Python snippet may hold imports and assignments of literals around the call of ``GRPOConfig``, or be the keyword
    arguments alone. Values are literals, names assigned before, and arithmetic on these.

    Raises:
        UserError: the text has none of the three forms, a value is not a literal, several calls are there to choose
            from, or settings are changed after the call; names the line or the key.
    """
    try:
        return _parsed(text)
    except RecursionError as error:
        raise UserError("the config is nested too deeply, or contains itself") from error


def _parsed(text: str) -> dict[str, Any]:
    tree = _python(text)
    if tree is not None and (call := _call(tree)) is not None:
        _refuse_changes(tree, call)
        return _keywords(tree, call)
    if _is_program(text):
        raise UserError(
            "there is no call of GRPOConfig with keyword arguments in the Python text; give the file, or the command "
            "line as `key: value` lines, that its settings are read from"
        )
    try:
        content = OmegaConf.to_container(OmegaConf.create(text), resolve=False)
    except (YAMLError, OmegaConfBaseException, ValueError, AssertionError) as error:  # the last for a number alone
        why = " ".join(str(error).split()) or "it is a value without a key"
        raise UserError(f"the config is neither JSON, YAML nor Python: {why}") from error
    if not isinstance(content, dict) or not content or all(value is None for value in content.values()):
        raise UserError("the config has no keys: give `key: value` lines, or the keyword arguments of a GRPOConfig")
    return {str(key): value for key, value in content.items()}


def parse_unread(text: str) -> list[str]:
    """Lines of a Python text after which the config, or its ``LoraConfig``, may hold other settings; see `unread`."""
    if (tree := _python(text)) is None:
        return []
    lines: dict[int, str] = {}
    for call in (_call(tree), _lora(tree)):
        lines |= {} if call is None else unread(tree, call)
    return [f"line {number}: {statement}" for number, statement in sorted(lines.items())]


def parse_lora(text: str) -> dict[str, Any] | None:
    """The keys and values of the ``LoraConfig`` of a Python snippet; None if there is none.

    Raises:
        UserError: a value is not a literal, there are several, or the adapter is made without one; names key or line.
    """
    if (tree := _python(text)) is None:
        return None
    if (call := _lora(tree)) is not None:
        _refuse_changes(tree, call)
        return _keywords(tree, call)
    for made in _named(tree, "get_peft_model"):  # of Unsloth
        if made.keywords:
            raise UserError(
                f"line {made.lineno}: {ast.unparse(made.func)} adds an adapter, without which all weights would be "
                "trained; write LoraConfig(r=..., ...) with its settings beside the GRPOConfig"
            )
    return None


def _python(text: str) -> ast.Module | None:
    """The syntax tree if the text calls a ``...Config`` or is a list of keyword arguments."""
    body = _without_magic(text)
    for candidate in (body, f"GRPOConfig(\n{body}\n)"):
        try:
            tree = ast.parse(candidate)
        except SyntaxError:
            continue
        if _call(tree) is not None:
            return tree
    return None


def _without_magic(text: str) -> str:
    """The text without the commands of a notebook."""
    return "\n".join("" if line.lstrip().startswith(("!", "%")) else line for line in text.splitlines())


def _call(tree: ast.Module) -> ast.Call | None:
    """The call of ``GRPOConfig``; if there is none, that of another config, such as a subclass."""
    if named := _named(tree, "GRPOConfig"):
        return _only([call for call in named if call.keywords])
    return _only([call for call in _named(tree, "Config") if call.keywords and _name(call) not in _OF_OTHERS])


def _lora(tree: ast.Module) -> ast.Call | None:
    return _only([call for call in _named(tree, "LoraConfig") if _name(call) == "LoraConfig"])


def _named(tree: ast.Module, ending: str) -> list[ast.Call]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Call) and _name(node).endswith(ending)]


def _name(call: ast.Call) -> str:
    return ast.unparse(call.func).split(".")[-1]


def _only(calls: list[ast.Call]) -> ast.Call | None:
    if len(calls) <= 1:
        return calls[0] if calls else None
    places = sorted((call.lineno, _name(call)) for call in calls)
    if len({name for _, name in places}) == 1:
        where = f"{places[0][1]} is called in lines {' and '.join(str(line) for line, _ in places)}"
    else:
        (first, name), *others = places
        where = " and ".join(
            [f"{name} is called in line {first}", *(f"{name} in line {line}" for line, name in others)]
        )
    raise UserError(f"{where}; leave one of the calls in the text")


def _is_program(text: str) -> bool:
    try:
        return any(isinstance(node, ast.Import | ast.ImportFrom) for node in ast.parse(_without_magic(text)).body)
    except (SyntaxError, ValueError):
        return False


def _refuse_changes(tree: ast.Module, call: ast.Call) -> None:
    """Refuses settings that are given to the config after its call, such as ``args.max_steps = 100``."""
    around = scopes_around(tree, call)
    names = [
        target
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign | ast.AnnAssign) and node.value is call
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
    ]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute) or isinstance(node.ctx, ast.Load):
            continue
        if any(_is_later(tree, node, name, call, around) for name in names):
            raise UserError(
                f"line {node.lineno}: {ast.unparse(node)} is set after the call of {_name(call)}; make it a keyword "
                "argument of that"
            )


def _is_later(tree: ast.Module, node: ast.Attribute, name: ast.expr, call: ast.Call, around: list[ast.AST]) -> bool:
    """Whether ``node`` is an attribute of what ``name`` is from ``call`` on: not before it, nor of another variable."""
    if ast.unparse(node.value) != ast.unparse(name):
        return False
    scopes = scopes_around(tree, node)
    if isinstance(name, ast.Name) and home_of(name.id, scopes) is not home_of(name.id, around):
        return False
    if scopes[-1] is not around[-1]:  # a function above the call may run after it
        return True
    return (node.lineno, node.col_offset) > (call.end_lineno or 0, call.end_col_offset or 0)


def _keywords(tree: ast.Module, call: ast.Call) -> dict[str, Any]:
    if call.args or any(keyword.arg is None for keyword in call.keywords):
        raise UserError(f"line {call.lineno}: write every setting as a keyword argument, without * and **")
    names = names_at(tree, call)
    values = {}
    for keyword in call.keywords:
        try:
            values[str(keyword.arg)] = value_of(keyword.value, names)
        except ValueError as error:
            raise UserError(f"{keyword.arg}={ast.unparse(keyword.value)}: {error}; write its value") from error
    return values
