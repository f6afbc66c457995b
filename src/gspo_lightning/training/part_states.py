"""The states of replaceable parts in a checkpoint: an estimator, reward functions and tasks with ``state_dict``.

Each rank has its own objects, so the states of all ranks are gathered; equal ones are stored once. A checkpoint is read
without pickle, so what a state may hold is checked when it is taken.
"""

from __future__ import annotations

import hashlib
import warnings
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.errors import UserError
from gspo_lightning.lightning_private import trainer_of
from gspo_lightning.rewards.by_task import object_of
from gspo_lightning.users_code import RAISED, keeps_state

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
_LISTS = (list, tuple, set)
_DICTS = (dict, OrderedDict)
_ALLOWED = "numbers, text, bytes, None, tensors, and lists, tuples, sets and dicts of them"


def parts_with_state(module: GSPOModule) -> dict[str, Any]:
    """The parts of a run that have a state, by the name that messages and checkpoints give them.

    Raises:
        UserError: a part has only one of ``state_dict`` and ``load_state_dict``.
    """
    parts: dict[str, Any] = {"advantages": module.advantages}
    if module.objective.entropy_target is not None:
        parts["objective.entropy_target"] = module.entropy_control
    parts |= {f"reward function {name}": object_of(spec.function) for name, spec in module.rewards.functions.items()}
    # Of a `PromptDataModule`; a module outside of a Trainer has no data.
    parts |= getattr(getattr(trainer_of(module), "datamodule", None), "tasks_by_key", {})
    return {name: part for name, part in parts.items() if keeps_state(part, name)}


def states_of(module: GSPOModule) -> dict[str, dict[str, Any]]:
    """This rank's states by part: the part, the name of its class, and a copy of its state.

    Raises:
        UserError: a ``state_dict`` raised, or holds something that a checkpoint cannot.
    """
    return {name: _taken(part, name) for name, part in parts_with_state(module).items()}


def check_states(module: GSPOModule) -> None:
    """Refuses, before the first rollout, a state that no checkpoint could hold, or rows made before their time.

    Raises:
        UserError: says which part it is.
    """
    states = states_of(module)
    if module.ahead is not None and (tasks := [name for name in states if name.startswith("data.task")]):
        raise UserError(
            f"rollout.engine.staleness=1: {tasks[0]} has a state, but its rows would be made a rollout before their "
            "time, and not again by a resumed run; set staleness to 0, or make rows from their index alone"
        )


def _taken(part: Any, name: str) -> dict[str, Any]:
    where = _named(part, name)
    try:
        state = part.state_dict()
    except RAISED as error:
        raise UserError(f"{where}: state_dict() raised {type(error).__name__}: {error}") from error
    return {"part": part, "class": type(part).__qualname__, "state": _copied(state, where, "")}


def put_back(module: GSPOModule) -> None:
    """Undoes what a rollout that broke off did to the states, where the same module is trained on.

    A part that was replaced in the meantime keeps its state.
    """
    parts = parts_with_state(module)
    for name, before in (module.states_before or {}).items():
        if parts.get(name) is before["part"]:
            _restore(before["part"], before["state"], f"{_named(before['part'], name)} does not take back its state")


def _named(part: Any, name: str) -> str:
    return f"{name} ({type(part).__name__})"


def _copied(value: Any, where: str, at: str) -> Any:
    """A copy of a state, with tensors on the CPU: a run that continues must not change what was taken before."""
    kind = type(value)
    if kind in _PLAIN:
        return value
    if kind in (Tensor, nn.Parameter) and value.layout is torch.strided:
        return value.detach().cpu().clone()
    if kind in _LISTS:
        return kind(_copied(item, where, f"{at}[{number}]") for number, item in enumerate(value))
    if kind in _DICTS:
        return kind((_copied(key, where, at), _copied(item, where, f"{at}[{key!r}]")) for key, item in value.items())
    raise UserError(
        f"{where}: its state_dict(){at} is of type {kind.__module__}.{kind.__qualname__}, which a checkpoint cannot "
        f"hold, because it is read without pickle; use {_ALLOWED}"
    )


# ---------------------------------------------------------------- checkpoints


def gathered_states(states: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The states of all ranks, for a checkpoint. All ranks must call it together.

    Args:
        states: of this rank, by part.

    Returns:
        The same, with ``states``, one per rank, in place of ``state``; a single one if all are equal.
    """
    prints: list[Any] = [{name: _fingerprint(own["state"]) for name, own in states.items()}]
    if world_size() > 1:
        prints *= world_size()
        dist.all_gather_object(prints, prints[rank()])
    result = {}
    for name, own in states.items():
        of_ranks = [own["state"]]
        if any(other.get(name) != prints[0][name] for other in prints):
            of_ranks *= world_size()
            dist.all_gather_object(of_ranks, own["state"])
        result[name] = {"class": own["class"], "states": of_ranks}
    return result


def _fingerprint(value: Any) -> str:
    """Equal for equal states alone, to the last bit of their numbers."""
    digest = hashlib.blake2b(digest_size=16)

    def add(item: Any) -> None:
        digest.update(f"{type(item).__name__} ".encode())
        if isinstance(item, Tensor):
            digest.update(f"{item.dtype} {tuple(item.shape)} ".encode())
            digest.update(item.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(item, dict):
            add([part for pair in item.items() for part in pair])
        elif isinstance(item, set):
            add(sorted(map(repr, item)))
        elif isinstance(item, _LISTS):
            digest.update(f"{len(item)} ".encode())
            for part in item:
                add(part)
        else:
            text = repr(item).encode()
            digest.update(f"{len(text)} ".encode() + text)

    add(value)
    return digest.hexdigest()


def restore_states(module: GSPOModule, saved: dict[str, dict[str, Any]]) -> None:
    """Gives every part the state that it has in a checkpoint.

    A part that only the checkpoint or only this run has, or that is of another class, is named in a warning: it is a
    setting that was changed.

    Raises:
        UserError: a part does not take its state, or ranks had different states and there is another number of them.
    """
    parts = parts_with_state(module)
    for name, part in parts.items():
        if name in saved and saved[name]["class"] == type(part).__qualname__:
            _load(part, name, saved[name]["states"])
        else:
            other = f"only one of {saved[name]['class']}" if name in saved else "none"
            _warn(f"ckpt_path: {_named(part, name)} starts afresh: the checkpoint has {other} in its place")
    for name in saved.keys() - parts.keys():
        _warn(
            f"ckpt_path: the checkpoint has a state of {name} ({saved[name]['class']}), which this run does not have "
            "or which has no state here; it is dropped"
        )


def _load(part: Any, name: str, states: list[Any]) -> None:
    where, ranks = _named(part, name), world_size()
    if len(states) not in (1, ranks):
        raise UserError(
            f"ckpt_path: {where} had another state on each of {len(states)} ranks; resume with {len(states)} ranks, "
            f"not {ranks}"
        )
    state = states[rank() if len(states) > 1 else 0]
    _restore(part, state, f"ckpt_path: {where} does not take its state in the checkpoint")


def _restore(part: Any, state: Any, refused: str) -> None:
    try:
        part.load_state_dict(_copied(state, refused, ""))
    except RAISED as error:
        raise UserError(f"{refused}: load_state_dict() raised {type(error).__name__}: {error}") from error


def _warn(line: str) -> None:
    if rank() == 0:
        warnings.warn(line, stacklevel=2)
