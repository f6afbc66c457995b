"""Checks before the first rollout: refuses settings under which training would silently go wrong."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from gspo_lightning.advantages import check_combination
from gspo_lightning.errors import UserError
from gspo_lightning.lightning_private import start_method, trainer_of
from gspo_lightning.objective.refusals import check_objective, warn_or_refuse
from gspo_lightning.rollout.engine import traits
from gspo_lightning.screen import counted
from gspo_lightning.training.callback_checks import check_callbacks
from gspo_lightning.training.hooks import refuse_uncalled
from gspo_lightning.training.prompt_source import prompt_source

if TYPE_CHECKING:
    from gspo_lightning.module import GSPOModule


def check_precision(precision: str, dtype: str, *, has_adapter: bool) -> None:
    """Refuses precisions in which training would silently go wrong.

    Args:
        precision: as the Trainer names it.
        dtype: of the weights, as `PolicyLoader` names it.
        has_adapter: whether only an adapter is trained.
    """
    if precision in ("16", "16-mixed", "16-true"):
        raise UserError(
            f"trainer.precision={precision} needs a scaled loss, whose gradient cannot be clipped here; use "
            "trainer.precision=bf16-mixed"
        )
    if precision in ("64", "64-true") and dtype != "float64":
        raise UserError(
            f"trainer.precision={precision} needs weights loaded in that precision; set model.dtype=float64"
        )
    if has_adapter:
        return
    # At usual learning rates, updates of full fine-tuning are smaller than the spacing of bfloat16.
    for key, value, fix in (("trainer.precision", precision, "bf16-mixed"), ("model.dtype", dtype, "float32")):
        if value in ("bf16-true", "transformer-engine", "bfloat16"):
            raise UserError(
                f"{key}={value} rounds the updates of full fine-tuning away; use {key}={fix}, "
                "or train an adapter (lora=language)"
            )


def check_caller(module: GSPOModule) -> None:
    """Refuses to be run by anything but a Trainer that calls all hooks of this module."""
    trainer, name = trainer_of(module), type(module).__name__
    if trainer is None:
        raise UserError(
            f"{name} is trained by a Trainer alone; with Fabric or in a loop of your own use gspo_lightning.objective "
            "and gspo_lightning.packing, as examples/bare_loop.py does"
        )
    if trainer.lightning_module is not module:
        raise UserError(
            f"{name} is a part of {type(trainer.lightning_module).__name__}, whose hooks alone Lightning calls; let "
            f"that be a subclass of {name}, which holds the other parts"
        )


def check_frozen(module: GSPOModule) -> None:
    """Refuses weights that were trained and are frozen now, of which the last values would be lost."""
    now = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    if lost := sorted(module.trained - now):
        raise UserError(
            f"{counted(len(lost), 'parameter that was trained is', 'parameters that were trained are')} frozen now, "
            f"the first is {lost[0]}: checkpoints, engines and the export take frozen weights from the model's source; "
            "set the learning rate of their group in the optimizer to 0 instead"
        )
    module.trained |= now


def check_fit(module: GSPOModule) -> None:
    """Refuses, once the Trainer has made its optimizer, wrong settings of a user's own program."""
    trainer: Any = module.trainer  # Lightning does not declare all of its attributes
    assert module.policy is not None
    check_precision(str(trainer.precision), module.policy_loader.dtype, has_adapter=module.policy.has_adapter)
    _check_dtypes(module)
    _check_dropout(module)
    _check_run(trainer)
    module.checked, module.empty_epochs = (), 0
    check_objective_in_force(module)
    refuse_uncalled(module)
    _check_optimizers(module)
    # Custom loaders give their first batch in every epoch.
    if trainer.overfit_batches and prompt_source(trainer) is not None:
        raise UserError(
            f"trainer.overfit_batches={trainer.overfit_batches}: each epoch would continue the stream of prompts; set "
            "overfit_rows=<count>, or give PromptDataModule gspo_lightning.data.first_rows.FirstRows(task, <count>)"
        )
    if module.policy.shards is not None:
        _check_own_parameters(module)


def _check_dtypes(module: GSPOModule) -> None:
    """Refuses weights that were narrowed behind the loader, as by ``module.half()``."""
    assert module.policy is not None
    for name, parameter in module.policy.named_parameters():
        if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
            raise UserError(
                f"{name} is trained, but in {parameter.dtype}, where most updates are rounded away; do not convert the "
                "module, and choose the precision of forwards by trainer.precision"
            )


def _check_dropout(module: GSPOModule) -> None:
    """Refuses layers that drop out in training, which a policy that was not made by `PolicyLoader` may have."""
    assert module.policy is not None
    for name, layer in module.policy.named_modules():
        rate = layer.p if isinstance(layer, nn.modules.dropout._DropoutNd) and layer.training else 0.0
        if rate:
            raise UserError(
                f"policy.{name} drops out at a rate of {rate:g}, with which the ratio would compare noise; make the "
                "model without dropout (lora_dropout=0 of peft)"
            )


def check_objective_in_force(module: GSPOModule) -> None:
    """Refuses an objective that contradicts itself, and warns of what has no effect, as configs are checked earlier.

    A program may set another one, or other update settings, at any time: each is looked at once.
    """
    assert module.policy is not None
    now = (module.objective, module.update_settings)
    if module.checked and all(one is other for one, other in zip(now, module.checked, strict=True)):
        return
    check_combination(getattr(module.rewards, "how", "weighted_sum"), module.advantages.scale_rewards)
    if module.objective.needs_ref and not module.policy.has_adapter and not module.references:
        raise UserError(
            "objective.beta: the reference is loaded with the policy, which was loaded for an objective without one; "
            "make the module with this objective"
        )
    update, sampling = module.update_settings, module.sampling
    for finding in check_objective(
        module.objective,
        num_iterations=update.num_iterations,
        num_minibatches=update.num_minibatches,
        ref_sync_every_n_rollouts=update.ref_sync_every_n_rollouts,
        ref_model_mixup_alpha=update.ref_model_mixup_alpha,
        has_adapter=module.policy.has_adapter,
        staleness=traits(module.engine).staleness,
        keep_zero_advantage=update.keep_zero_advantage,
        old_logprobs=update.old_logprobs,
        max_completion_length=sampling.max_completion_length,
    ):
        warn_or_refuse(finding)
    module.checked = now


def _check_run(trainer: Any) -> None:
    """Refuses a Trainer that cannot compute a rollout, would lose the trained module, or would never end."""
    if (device := trainer.strategy.root_device.type) not in ("cpu", "cuda"):
        raise UserError(
            f"trainer.accelerator: Lightning chose {device}, but only cuda and cpu are supported (a rollout is summed "
            "in float64, which Apple's GPUs lack); set accelerator='cpu'"
        )
    if start_method(trainer) is not None:
        raise UserError(
            "trainer.strategy: processes started by ddp_spawn or ddp_notebook lose what they trained when they end; "
            "use strategy='ddp' in a script"
        )
    if trainer.min_steps:
        raise UserError(
            f"trainer.min_steps={trainer.min_steps}: max_rollouts ends the run, and Lightning would wait for steps "
            "that never come; leave min_steps out"
        )
    check_callbacks(trainer)


def _check_optimizers(module: GSPOModule) -> None:
    """Refuses optimizers and schedulers of an overridden ``configure_optimizers`` that a minibatch cannot step."""
    optimizers, configs = module.trainer.optimizers, module.trainer.lr_scheduler_configs
    for kind, count in (("optimizers", len(optimizers)), ("schedulers", len(configs))):
        if count > 1:
            raise UserError(
                f"configure_optimizers: {count} {kind}, but a minibatch is one step of a single one; return one "
                "optimizer with parameter groups, and at most one scheduler"
            )
    # If it returns None, Lightning makes an optimizer with a tensor of its own.
    stepped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    if stepped.isdisjoint(map(id, module.parameters())):
        raise UserError("configure_optimizers: no optimizer of this module's parameters; return one of them")
    stepping: list[Any] = [*optimizers, *(config.scheduler for config in configs)]
    for made in stepping:
        if (missing := _needed(type(made).step)) is not None:
            raise UserError(
                f"configure_optimizers: {type(made).__name__}.step() needs {missing}, but a minibatch is one step "
                "without arguments; return one that needs none"
            )
    # The interval is not checked: Lightning fills in its own if a program has named none.
    if configs and configs[0].frequency != 1:
        raise UserError(
            f"configure_optimizers: frequency={configs[0].frequency}, but the scheduler steps once per minibatch; "
            "leave frequency out and count minibatches in the scheduler"
        )


def _needed(step: Any) -> str | None:
    """Name of the first required argument of a method, ``self`` aside; None if there is none."""
    _, *others = inspect.signature(step).parameters.values()
    required = (p for p in others if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD))
    return next((p.name for p in required), None)


def _check_own_parameters(module: GSPOModule) -> None:
    """Refuses a whole parameter next to sharded ones: its gradient would not be averaged over ranks."""
    for name, parameter in module.named_parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            raise UserError(
                f"trainer.strategy: the parameter {name} is whole, but the other weights are split over ranks; call "
                'fully_shard on it in configure_model, with mesh=self.device_mesh["data_parallel"], or use trainer=ddp'
            )
