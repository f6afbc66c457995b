"""The state of a run in a checkpoint, besides weights and optimizer, and checks that it fits this run."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.optim import Optimizer

from gspo_lightning.distributed.ranks import rank, whole
from gspo_lightning.errors import UserError
from gspo_lightning.screen import counted
from gspo_lightning.training.left_out import base_state, check_base
from gspo_lightning.training.part_states import gathered_states, restore_states, states_of
from gspo_lightning.training.sampling_change import restore_sampling, sampling_state

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule
    from gspo_lightning.policy.model import Policy

_PAGED_NUMEL = 1e5
"""bitsandbytes pages the states of parameters with at least this many elements."""


def leave_frozen_out(module: nn.Module) -> None:
    """Leaves frozen weights out of the module's state dict from now on, also as part of another module.

    Frozen weights are loaded from their source; a state without them still loads strictly.
    """
    module.register_state_dict_post_hook(_delete_frozen)
    module.register_load_state_dict_pre_hook(_keep_frozen)


def _frozen(module: nn.Module, prefix: str) -> dict[str, nn.Parameter]:
    """Frozen parameters by name, with duplicates: a tied output embedding has two names."""
    named = module.named_parameters(remove_duplicate=False)
    return {prefix + name: parameter for name, parameter in named if not parameter.requires_grad}


def _delete_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    frozen = _frozen(module, prefix)
    for name in [n for n in state if n in frozen or _weight_of(n) in frozen]:
        del state[name]


def _weight_of(entry: str) -> str:
    """The quantised weight that an additional entry is of, such as ``weight.absmax`` (4 bits) and ``SCB`` (8 bits)."""
    module, _, name = entry.rpartition(".")
    return f"{module}.weight" if name in ("SCB", "weight_format") else f"{entry.partition('.weight.')[0]}.weight"


def _keep_frozen(module: nn.Module, state: dict[str, Any], prefix: str, _: Any, strict: bool, *__: Any) -> None:
    if strict:
        for name, parameter in _frozen(module, prefix).items():
            state.setdefault(name, parameter)


def run_state(module: GSPOModule) -> dict[str, Any]:
    """Counters, sampling, states of parts, the rollout generated ahead, a moved reference. All ranks must call it."""
    from gspo_lightning import __version__

    _say_if_cut(module)
    state = {
        "version": __version__,
        "rollouts_done": module.rollouts_done,
        "counts": dict(module.counts),
        "nonfinite_in_a_row": module.guarded_step.nonfinite_in_a_row,
        "optimizer": _made_class(module),
        "base": base_state(module),
        "sampling": sampling_state(module),
        # While a rollout is in hand, those from before it: a resumed run collects it again.
        "parts": gathered_states(states_of(module) if module.states_before is None else module.states_before),
    }
    if module.ahead is not None:
        state["ahead"] = module.ahead.state_dict(in_hand=module.states_before is not None)
    if module.reference_moves:
        state["reference"] = [_whole_state(policy) for policy in module.references]
    return state


def _say_if_cut(module: GSPOModule) -> None:
    """Warns of a checkpoint within a rollout, such as Lightning's on an exception, whose weights are between two."""
    steps = module.counts["optimizer_steps"] - int(module.last_metrics.get("count/optimizer_steps", 0))
    if module.states_before is not None and steps and rank() == 0:
        warnings.warn(
            f"checkpoint: its weights have taken {counted(steps, 'optimizer step')} of rollout "
            f"{module.rollouts_done + 1}, which a run that resumes from it begins anew; "
            "gspo_lightning.callbacks.checkpoint.RolloutCheckpoint saves whole rollouts",
            stacklevel=2,
        )


def _whole_state(policy: Policy) -> dict[str, Tensor]:
    """State of a policy; if it is split over ranks, whole on the CPU of rank 0, which writes it, and empty elsewhere.

    One parameter is whole on a device at a time. It is moved to the CPU because a state saved from a GPU would be
    loaded onto that GPU by all ranks.
    """
    state: dict[str, Tensor] = policy.state_dict()
    if policy.shards is None:
        return state
    kept = {}
    for name, value in state.items():
        gathered = whole(value)  # by all ranks
        if rank() == 0:
            kept[name] = gathered.cpu()
        del gathered  # before the next one is gathered
    return kept


def restore_run_state(module: GSPOModule, state: dict[str, Any]) -> None:
    """Restores the result of `run_state` into the module.

    Raises:
        UserError: the checkpoint was saved with another optimizer, whose states this one cannot use, or with another
            factor of its adapter.
    """
    is_ours = getattr(type(module).configure_optimizers, "__module__", "") == "gspo_lightning.module"
    saved, own = state["optimizer"], _class_name(module.optimizer_factory) if is_ours else None
    if saved is not None and own is not None and saved != own:
        raise UserError(
            f"optimizer: the checkpoint was saved with {saved}, not {own}; keep that one, "
            "or start a new run from the exported model (model=path model.path=.../model)"
        )
    if "base" in state and module.policy is not None:  # older checkpoints say nothing of it
        check_base(module, state["base"])
    module.rollouts_done, module.counts = state["rollouts_done"], {**module.counts, **state["counts"]}
    # The pace of the next rollout is measured by what it adds to these.
    module.last_metrics = {f"count/{name}": float(count) for name, count in module.counts.items()}
    module.guarded_step.nonfinite_in_a_row = state["nonfinite_in_a_row"]
    restore_states(module, state["parts"])
    module.states_before = None
    same_settings = restore_sampling(module, state["sampling"])
    if module.ahead is not None:
        module.ahead.load_state_dict(state.get("ahead", {}))
        if not same_settings:
            module.ahead.forget_sampling()
    for policy, weights in zip(module.references, state.get("reference", ()), strict=False):
        set_model_state_dict(policy, weights, options=StateDictOptions(full_state_dict=True))
        # From now on it must be saved, whatever the settings say: no model folder holds it.
        module.reference_moves = True


def keep_settings(optimizer: Optimizer, factory: Any) -> None:
    """Keeps this run's numeric optimizer settings when its state is loaded from a checkpoint saved with others.

    Numbers only: flags such as ``amsgrad`` decide what the state consists of, so others than in the checkpoint are
    refused; and some optimizers keep counters in their groups.

    Args:
        optimizer: not yet loaded.
        factory: made the optimizer; for a `functools.partial` all settings are known, for others only the lr.

    Raises:
        UserError: when a state is loaded that was saved with other flags.
    """
    given = getattr(factory, "keywords", {})
    names = {"lr", *(name for name, value in given.items() if _is_numeric(value))}
    own = [{name: group[name] for name in names if name in group} for group in optimizer.param_groups]
    flags = [{name: group[name] for name in given.keys() - names if name in group} for group in optimizer.param_groups]

    def put_back(loaded: Optimizer) -> None:
        for group, its_flags in zip(loaded.param_groups, flags, strict=False):
            _refuse_other_flags(its_flags, group)
        for group, settings in zip(loaded.param_groups, own, strict=False):  # groups added since keep their own
            rate, before = settings["lr"], group.get("initial_lr", group["lr"])
            # Scaled to the schedule's current factor; equal rates are left alone, to the last bit.
            now = group["lr"] if rate == before else rate * (group["lr"] / before if before else 1.0)
            group.update({**settings, "lr": now, **({"initial_lr": rate} if "initial_lr" in group else {})})

    if type(optimizer).load_state_dict is Optimizer.load_state_dict:
        optimizer.register_load_state_dict_pre_hook(_refuse_other_groups)
        optimizer.register_load_state_dict_post_hook(put_back)
        return
    load = optimizer.load_state_dict

    def load_and_put_back(*args: Any, **kwargs: Any) -> None:
        load(*args, **kwargs)
        put_back(optimizer)

    # An overridden method, such as that of bitsandbytes, calls no hooks.
    optimizer.load_state_dict = load_and_put_back  # type: ignore[method-assign]


def _refuse_other_groups(optimizer: Optimizer, state: dict[str, Any]) -> None:
    """Refuses states of other numbers of parameters, which torch would refuse by a ValueError."""
    own, saved = (
        [len(group["params"]) for group in groups] for groups in (optimizer.param_groups, state["param_groups"])
    )
    if own != saved:
        raise UserError(
            f"ckpt_path: the checkpoint's optimizer has groups of {saved} parameters, and this run's of {own}; train "
            "the same part of the model (model.train_vision, model.train_language, lora), or start a new run from the "
            "exported model (model=path model.path=.../model)"
        )


def _refuse_other_flags(own: dict[str, Any], saved: dict[str, Any]) -> None:
    for name in sorted(own):
        if own[name] != saved.get(name, own[name]):
            raise UserError(
                f"optimizer.{name}={own[name]}: the checkpoint was saved with {saved[name]}, which decides how its "
                "states go on; keep that, or start a new run from the exported model (model=path model.path=.../model)"
            )


def page_again(optimizer: Optimizer) -> None:
    """Moves loaded states of a paged bitsandbytes optimizer back into paged memory.

    Its ``load_state_dict``, and Lightning after it, move them to the device as ordinary tensors, and the optimizer
    allocates paged memory only when a state is first made: a run that fits only by paging would not fit when resumed.

    Tested with buffers that only claim to be paged; it was not run on a GPU, and on a CPU nothing is paged.

    Args:
        optimizer: any; one that is not paged is left alone.
    """
    new_buffer = getattr(optimizer, "get_state_buffer", None)
    if new_buffer is None or not getattr(optimizer, "is_paged", False):
        return
    for parameter, state in optimizer.state.items():
        for name in ("state1", "state2"):
            loaded = state.get(name)
            # The optimizer pages only large states; the others already are on the device, where it keeps them.
            if loaded is None or getattr(loaded, "is_paged", False) or parameter.numel() < _PAGED_NUMEL:
                continue
            state[name] = new_buffer(parameter, dtype=loaded.dtype).copy_(loaded)
            del loaded  # only one state at a time exists twice


def _is_numeric(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_numeric, value))
    return isinstance(value, int | float) and not isinstance(value, bool)


def refuse_other_model(parameters: Iterable[tuple[str, Tensor]], saved: dict[str, tuple[int, ...]]) -> None:
    """Refuses the weights of another model.

    Args:
        parameters: names and trained parameters.
        saved: shapes in the checkpoint, by name.

    Raises:
        UserError: a parameter is missing there or has another shape.
    """
    own = {name: tuple(parameter.shape) for name, parameter in parameters}
    if other := sorted(name for name, shape in own.items() if saved.get(name) != shape):
        raise UserError(
            f"ckpt_path: the checkpoint is of another model or adapter: "
            f"{counted(len(other), 'trained parameter is', 'trained parameters are')} missing or of another shape, "
            f"the first is {other[0]} (here {own[other[0]]}, there {saved.get(other[0], 'none')})"
        )


def _made_class(module: GSPOModule) -> str | None:
    """Class name of the Trainer's optimizer; None if it has none."""
    optimizers = module.trainer.optimizers
    return type(optimizers[0]).__name__ if optimizers else None


def _class_name(factory: Any) -> str | None:
    """Class name of the optimizer that a factory makes; None for a function, whose result is unknown."""
    factory = getattr(factory, "func", factory)
    return factory.__name__ if isinstance(factory, type) else None
