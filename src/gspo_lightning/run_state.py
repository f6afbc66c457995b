"""What a checkpoint holds of a run beside weights and optimizer, and whether it belongs to this run."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict

from gspo_lightning.distributed import whole
from gspo_lightning.errors import UserError

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def trained_part(state: dict[str, Any], parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    """A state dict without frozen weights: they come from where they were loaded.

    Args:
        state: of the module.
        parameters: with duplicates, for a tied output embedding has two names.
    """
    frozen = {name for name, parameter in parameters if not parameter.requires_grad}
    # A frozen weight in 4 bits brings entries of its own along, such as `weight.absmax`.
    return {
        name: value
        for name, value in state.items()
        if name not in frozen and f"{name.partition('.weight.')[0]}.weight" not in frozen
    }


def run_state(module: GSPOModule) -> dict[str, Any]:
    """Counters, the rollout generated ahead, and a reference that has moved."""
    from gspo_lightning import __version__

    state = {
        "version": __version__,
        "rollouts_done": module.rollouts_done,
        "counts": dict(module.counts),
        "nonfinite_in_a_row": module.guarded_step.nonfinite_in_a_row,
        "optimizer": _name(module.optimizer_factory),
    }
    if module.ahead is not None:
        state["ahead"] = module.ahead.state_dict()
    if module.reference_moves:
        state["reference"] = [
            {name: whole(value) for name, value in policy.state_dict().items()} for policy in module.references
        ]
    return state


def restore_run_state(module: GSPOModule, state: dict[str, Any]) -> None:
    """The same, back into the module.

    Raises:
        UserError: the checkpoint was saved with another optimizer, whose states mean nothing to this one.
    """
    saved, own = state.get("optimizer"), _name(module.optimizer_factory)
    if saved is not None and saved != own:
        raise UserError(
            f"optimizer: the checkpoint was saved with {saved}, not {own}; go on with that one, "
            "or start anew from the exported model (model=path model.path=.../model)"
        )
    module.rollouts_done, module.counts = state["rollouts_done"], {**module.counts, **state["counts"]}
    # What the next rollout adds to these is what its pace is measured by.
    module.last_metrics = {f"count/{name}": float(count) for name, count in module.counts.items()}
    module.guarded_step.nonfinite_in_a_row = state["nonfinite_in_a_row"]
    if module.ahead is not None and module.policy is not None:
        module.ahead.load_state_dict(state.get("ahead", {}), module.policy)
    for policy, weights in zip(module.references, state.get("reference", ()), strict=False):
        set_model_state_dict(policy, weights, options=StateDictOptions(full_state_dict=True))
        # From now on it is one that no folder holds, whatever the settings say.
        module.reference_moves = True


def refuse_other_model(parameters: Iterable[tuple[str, Tensor]], saved: dict[str, tuple[int, ...]]) -> None:
    """Refuses the weights of another model.

    Args:
        parameters: the trained ones.
        saved: shapes in the checkpoint.

    Raises:
        UserError: a parameter is missing there or has another shape.
    """
    own = {name: tuple(parameter.shape) for name, parameter in parameters}
    if other := sorted(name for name, shape in own.items() if saved.get(name) != shape):
        raise UserError(
            f"ckpt_path: the checkpoint is of another model or adapter: {len(other)} trained parameters are "
            f"missing or of another shape, the first is {other[0]} (here {own[other[0]]}, there "
            f"{saved.get(other[0], 'none')})"
        )


def _name(factory: Any) -> str:
    factory = getattr(factory, "func", factory)
    return getattr(factory, "__name__", type(factory).__name__)
