"""What training refuses before its first rollout: settings under which it would go wrong without a word."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.distributed.tensor import DTensor

from gspo_lightning.errors import UserError
from gspo_lightning.types import PromptBatch

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule

HOTTEST = 100
"""Largest temperature: logits, which differ by tens, differ by tenths after it."""


def check_precision(precision: str, dtype: str, *, has_adapter: bool) -> None:
    """Refuses precisions in which training would go wrong without a word.

    Args:
        precision: as the Trainer names it.
        dtype: of the weights, as `PolicyLoader` names it.
        has_adapter: whether an adapter is trained, and not all weights.
    """
    if precision in ("16", "16-mixed", "16-true"):
        raise UserError(
            f"trainer.precision={precision} needs a loss that is scaled, whose gradient cannot be clipped here; use "
            "trainer.precision=bf16-mixed"
        )
    if precision in ("64", "64-true") and dtype != "float64":
        raise UserError(f"trainer.precision={precision} needs weights that are loaded so; set model.dtype=float64")
    if has_adapter:
        return
    # Updates of all weights at usual rates are smaller than the spacing of bfloat16.
    for key, value, fix in (("trainer.precision", precision, "bf16-mixed"), ("model.dtype", dtype, "float32")):
        if value in ("bf16-true", "transformer-engine", "bfloat16"):
            raise UserError(
                f"{key}={value} rounds the updates of full fine-tuning away; use {key}={fix}, "
                "or train an adapter (lora=language)"
            )


def check_sampling(temperature: float, repetition_penalty: float) -> None:
    """Refuses rollouts that there is nothing to learn from, or that are of another distribution than the policy's."""
    if not temperature > 0:
        raise UserError(f"rollout.temperature={temperature} must be above 0: greedy completions are all equal")
    if temperature > HOTTEST:
        raise UserError(
            f"rollout.temperature={temperature} must be at most {HOTTEST}: every token of the vocabulary would be as "
            "likely as any other, whatever is learned"
        )
    if repetition_penalty != 1.0:
        raise UserError(
            "rollout.repetition_penalty must be 1.0 in training: it depends on the history, so the policy's "
            "log-probabilities would not be those of the distribution that was sampled"
        )


def check_fit(module: GSPOModule) -> None:
    """Refuses, once the Trainer has made its optimizer, what a program of one's own may have set."""
    trainer: Any = module.trainer  # Lightning does not declare all of its attributes
    sampling = module.sampling
    assert module.policy is not None
    check_precision(str(trainer.precision), module.policy_loader.dtype, has_adapter=module.policy.has_adapter)
    check_sampling(sampling.temperature, sampling.repetition_penalty)
    if (longest := getattr(getattr(trainer, "datamodule", None), "max_prompt_length", None)) is not None:
        check_rotation(module.policy.config, longest, sampling.max_completion_length)
    for kind, found in (("optimizers", trainer.optimizers), ("schedulers", trainer.lr_scheduler_configs)):
        if len(found) > 1:
            raise UserError(
                f"configure_optimizers: {len(found)} {kind}, but a minibatch is one step of one; return one optimizer "
                "with parameter groups, and at most one scheduler"
            )
    # Loaders of one's own give their first batch in every epoch.
    if trainer.overfit_batches and hasattr(getattr(trainer, "datamodule", None), "finish"):
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches}: each epoch would go on in the stream of prompts; set "
            "overfit_rows=<count>, or give PromptDataModule gspo_lightning.data.first_rows.FirstRows(task, <count>)"
        )
    if module.policy.shards is not None:
        _check_own_parameters(module)


def _check_own_parameters(module: GSPOModule) -> None:
    """Beside split weights, the gradient of a whole parameter would stay that of its rank."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise UserError(
                f"trainer.strategy: the parameter {name} is whole beside weights that are split over ranks; call "
                'fully_shard on it in configure_model, with mesh=self.device_mesh["data_parallel"], or use trainer=ddp'
            )


def check_rotation(config: Any, prompt_tokens: int, completion_tokens: int) -> None:
    """Refuses sequences that change the rotation of all others in their row, in sampling from one token to the next.

    Rotary embeddings of the kinds longrope and dynamic take their frequencies from the longest sequence of a forward.
    """
    limit = _rotation_limit(config.get_text_config())
    if limit is not None and prompt_tokens + completion_tokens > limit:
        raise UserError(
            f"data.max_prompt_length + rollout.max_completion_length: prompts of {prompt_tokens} and completions of "
            f"{completion_tokens} tokens pass {limit}, where this model's rotary embedding becomes another one for all "
            "tokens before; lower one of them, or set the kind of rotation in model.overrides"
        )


def _rotation_limit(config: Any) -> int | None:
    """Tokens up to which all rotations of a model stay what they are; None if they always do."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [kind for kind in (rope, *rope.values()) if isinstance(kind, dict)]  # one, or one per kind of layer
    limits = []
    for kind in kinds:
        if kind.get("rope_type") == "longrope":
            limits.append(kind.get("original_max_position_embeddings") or config.original_max_position_embeddings)
        elif kind.get("rope_type") == "dynamic":
            limits.append(config.max_position_embeddings)
    return min(limits, default=None)


def check_batch(batch: Any, module: GSPOModule) -> None:
    """Refuses what a loader of one's own may give and no rollout can be made of."""
    if not isinstance(batch, PromptBatch):
        raise UserError(
            f"train_dataloader: a batch is a {type(batch).__name__}, not a PromptBatch; give "
            "PromptBatch(prompts) by DataLoader(..., batch_size=None)"
        )
    if not batch.prompts:
        raise UserError("train_dataloader: a PromptBatch without prompts; leave empty batches out")
    assert module.policy is not None
    longest = max(len(prompt.input_ids) for prompt in batch.prompts)
    check_rotation(module.policy.config, longest, module.sampling.max_completion_length)


def say_nothing_is_left(module: GSPOModule) -> None:
    """One line where a run is begun that was over before."""
    if module.trainer.is_global_zero:
        done = f"{module.rollouts_done} of {module.max_rollouts} rollouts are done"
        print(f"{done}, so nothing is trained; raise max_rollouts to go on", flush=True)
