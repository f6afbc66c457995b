"""Every check of a resolved config that needs no model."""

from __future__ import annotations

from typing import Any

from gspo_lightning.advantages import check_combination, check_group
from gspo_lightning.callbacks.best import NO_BETTER
from gspo_lightning.config.build import build, check_trainer, time_limits
from gspo_lightning.config.devices import check_devices, check_sharding, is_sharded
from gspo_lightning.config.effects import check_best, check_training, is_among, no_effect, validation_metrics
from gspo_lightning.config.hardware import on_gpu, ranks, warn_of_slow_products
from gspo_lightning.config.optimizer import check_optimizer, check_schedule
from gspo_lightning.config.own_module import check_module
from gspo_lightning.config.targets import check_targets
from gspo_lightning.config.types import check_calls
from gspo_lightning.errors import UserError
from gspo_lightning.objective.refusals import check_objective, refuse_turn_rewards, warn_or_refuse
from gspo_lightning.policy.hub import check_push
from gspo_lightning.policy.quantization import check_quantization
from gspo_lightning.rollout.weights import refuse_merging
from gspo_lightning.training.callback_checks import NEVER_HERE
from gspo_lightning.training.sampling_checks import check_sampling, check_support, compared_by
from gspo_lightning.training.trainer_checks import check_precision
from gspo_lightning.training.update import check_minibatches


def check(plain: dict[str, Any], *, training: bool = True) -> None:
    """Refuses, in one line, what is wrong with a config before anything is loaded.

    Args:
        plain: the resolved config.
        training: False where a model is measured only, so that nothing need suit an update.
    """
    check_devices(plain)  # first: a machine cannot get around what it has
    if is_sharded(plain):
        check_sharding(plain)
    export, model = plain["export"], plain["model"]
    check_push(export["push_to_hub"], exported=export["enabled"], private=export["private"])
    check_quantization(model.get("quantization"), model.get("lora"))
    refuse_merging(bool(model.get("quantization")), plain["rollout"]["engine"].get("lora_sync"))
    check_targets(plain)
    check_module(plain["module"])
    check_trainer(plain["trainer"])
    check_calls(plain)
    _check_router(model)
    _check_budget(plain)
    if training:
        check_precision(str(plain["trainer"]["precision"]), model["dtype"], has_adapter=bool(model.get("lora")))
    time_limits(plain["trainer"])  # these two say themselves what they cannot be
    build(plain["update"])
    check_optimizer(plain["optimizer"], on_gpu=on_gpu(plain["trainer"]["accelerator"]))
    rollout = plain["rollout"]
    check_sampling(
        rollout["temperature"], rollout["repetition_penalty"], rollout.get("top_k", 0), rollout.get("min_p", 0.0)
    )
    estimator: Any = None  # one of the user's own is made once, with the module, which is asked the same
    if str(plain["advantages"]["_target_"]).startswith("gspo_lightning."):
        estimator = build(plain["advantages"])
        check_group(estimator, rollout["num_generations"], plain["dynamic_sampling"]["max_draws"])
    _check_support(plain)
    _check_model_path(plain)
    _check_environment(plain)
    _check_callbacks(plain)
    _check_loggers(plain)
    _report(plain)
    warn_of_slow_products(plain)
    if training:
        if scale := plain["advantages"].get("scale_rewards") or getattr(estimator, "scale_rewards", ""):
            check_combination(plain["reward"].get("combine", ""), scale)
        check_schedule(plain)
        check_best(plain)
        check_training(plain)
        _check_export(plain)
        _check_minibatches(plain)
    else:
        _check_measured(plain)


def _check_budget(plain: dict[str, Any]) -> None:
    """A micro-batch must hold one sequence."""
    budget = plain["update"]["max_tokens_per_microbatch"]
    longest = plain["data"]["max_prompt_length"] + plain["rollout"]["max_completion_length"]
    if budget < longest:
        raise UserError(
            f"update.max_tokens_per_microbatch={budget} is less than one sequence "
            f"(data.max_prompt_length + rollout.max_completion_length = {longest}); raise it to at least that"
        )


def _check_support(plain: dict[str, Any]) -> None:
    """Weights between two distributions need every token to be possible under both."""
    rollout, old = plain["rollout"], plain["update"].get("old_logprobs", "policy")
    if (by := compared_by(bool(plain["objective"].get("mismatch")), old)) is not None:
        check_support(rollout.get("top_p", 1.0), rollout.get("top_k", 0), rollout.get("min_p", 0.0), by)


def _check_model_path(plain: dict[str, Any]) -> None:
    """Tokens of another tokenizer would be other words to the model, or none."""
    model, data = plain["model"]["path"], plain["data"].get("model_path")
    if data is not None and data != model:
        raise UserError(
            f"data.model_path={data} is not model.path={model}: prompts are encoded by the tokenizer of the model that "
            "is trained; remove data.model_path"
        )


def _check_router(model: dict[str, Any]) -> None:
    """Models with experts bring an auxiliary loss along, which their own training reads."""
    for key in ("output_router_logits", "router_aux_loss_coef"):
        if (model.get("overrides") or {}).get(key):
            raise UserError(
                f"model.overrides.{key} has no effect: only the policy gradient trains a router here; remove it, or "
                "add the term in a subclass (GSPOModule.auxiliary_loss)"
            )


def _check_callbacks(plain: dict[str, Any]) -> None:
    """Lightning's callbacks that would do nothing here, or end the run with a traceback."""
    for name, node in (plain["callbacks"] or {}).items():
        kind = str((node or {}).get("_target_")).rpartition(".")[2]
        if kind == "EarlyStopping" and plain["validation"]["every_n_rollouts"] is None:
            raise UserError(
                f"callbacks.{name}: EarlyStopping looks at its metric after each validation, and none falls inside "
                "the run; set validation.every_n_rollouts"
            )
        if kind == "EarlyStopping" and node.get("strict", True):
            _check_monitor(f"callbacks.{name}.monitor", str(node.get("monitor")), plain)
        if kind == "EarlyStopping" and node.get("mode", "min") == "min":
            _check_direction(f"callbacks.{name}", str(node.get("monitor")), plain)
        if kind == "LearningRateMonitor" and not any((plain["logger"] or {}).values()):
            raise UserError(f"callbacks.{name}: LearningRateMonitor needs a logger; choose one with logger=")
        if (reason := (NEVER_HERE | _REPLACED).get(kind)) is not None:
            raise UserError(f"callbacks.{name}: {kind} {reason}")


def _check_loggers(plain: dict[str, Any]) -> None:
    """Lightning's loggers upload models when its own callback has saved one."""
    for name, node in (plain["logger"] or {}).items():
        if str((node or {}).get("_target_")).startswith("lightning.") and node.get("log_model"):
            raise UserError(
                f"logger.{name}.log_model={node['log_model']} has no effect: it uploads what Lightning's "
                "ModelCheckpoint saves, which a run does not have; leave it out (export.push_to_hub uploads the model)"
            )


_REPLACED = {
    "ModelCheckpoint": "is replaced by checkpoint.keep_last and keep_best",
    "OnExceptionCheckpoint": "is replaced by checkpoint.every_n_rollouts: the last one of whole rollouts stays",
    **dict.fromkeys(("TQDMProgressBar", "RichProgressBar"), "is replaced by callbacks.progress"),
    "BackboneFinetuning": (
        "unfreezes layers after an epoch, and a run is one epoch; leave it out: model.lora, train_vision and "
        "train_language say what is trained"
    ),
}
"""Callbacks of Lightning in place of which the commands have their own, or none."""


def _check_monitor(key: str, metric: str, plain: dict[str, Any]) -> None:
    """A metric of validations that none measures would end the run at the first one within it."""
    nodes = [plain["module"], *filter(None, plain["callbacks"].values())]
    is_ours = all(str(node["_target_"]).startswith(("gspo_lightning.", "lightning.")) for node in nodes)
    if not metric.startswith("val/") or not is_ours:  # what a class of the user's own logs is not known here
        return
    names = validation_metrics(plain)
    if not is_among(metric, names):
        raise UserError(f"{key}={metric}: validation does not measure it; it measures {', '.join(names)}")


def _check_direction(key: str, metric: str, plain: dict[str, Any]) -> None:
    """Lightning's default is for losses, which a run does not have: it would end one that gets better."""
    better = [name for name in validation_metrics(plain) if name != NO_BETTER]
    if metric == "reward/mean" or is_among(metric, better):
        raise UserError(
            f"{key}: EarlyStopping with mode=min, its default, ends the run when {metric} no longer falls; set "
            f"{key}.mode=max"
        )


def _check_environment(plain: dict[str, Any]) -> None:
    """The reward of an environment needs one that gives rewards; tools are looked up, so that their key is named."""
    node = plain["environment"]
    tools = build(node) if (node or {}).get("_target_") == "gspo_lightning.dialogue.Tools" else None
    for name, spec in plain["reward"].get("functions", {}).items():
        path = str((spec.get("function") or {}).get("path", "")) if isinstance(spec, dict) else ""
        if not (path.startswith("gspo_lightning.rewards") and path.endswith(".environment_reward")):
            continue
        if not node:
            raise UserError(
                f"reward.functions.{name}: there is no environment to give a reward; set one, such as "
                "environment=calculator"
            )
        if tools is not None and not tools.rewards:
            raise UserError(
                f"reward.functions.{name}: functions give no reward; name a class with a reward method in "
                "environment.functions, or choose another reward"
            )


def _check_export(plain: dict[str, Any]) -> None:
    """Folding an adapter into the weights needs one, and weights that do not round it away."""
    export, model = plain["export"], plain["model"]
    if not export["enabled"] or not export["merge_lora"]:
        return
    if not model.get("lora"):
        raise UserError("export.merge_lora=true has no effect: there is no adapter; set it to false")
    if model.get("quantization"):
        raise UserError(
            f"export.merge_lora=true: merged into weights of model.quantization={model['quantization']}, the adapter "
            "would be rounded away; export only the adapter (export.merge_lora=false)"
        )


def _check_measured(plain: dict[str, Any]) -> None:
    """What a measurement would pass over."""
    if plain["ckpt_path"] is not None:
        raise UserError(
            f"ckpt_path={plain['ckpt_path']}: evaluate.py measures models, not checkpoints; name the folder that a run "
            "exports: model=path model.path=<run>/model"
        )
    if plain["dry_run"]:
        raise UserError("dry_run=true: evaluate.py always measures; train.py dry_run=true prints what a run would need")


def _check_minibatches(plain: dict[str, Any]) -> None:
    """Every rank must have as many prompts for each minibatch, and none left over; `minibatches_of` asks again."""
    check_minibatches(plain["data"]["prompts_per_rollout"], plain["update"]["num_minibatches"], ranks(plain))


def _report(plain: dict[str, Any]) -> None:
    objective = build(plain["objective"])
    # One of the user's own says by its first reward only that it rewards turns.
    if ((plain["environment"] or {}).get("make") or {}).get("turn_rewards"):
        refuse_turn_rewards(objective)
    findings = check_objective(
        objective,
        num_iterations=plain["update"]["num_iterations"],
        num_minibatches=plain["update"]["num_minibatches"],
        ref_sync_every_n_rollouts=plain["update"]["ref_sync_every_n_rollouts"],
        ref_model_mixup_alpha=plain["update"]["ref_model_mixup_alpha"],
        has_adapter=bool(plain["model"].get("lora")),
        staleness=plain["rollout"]["engine"].get("staleness", 0),
        keep_zero_advantage=plain["update"]["keep_zero_advantage"],
        old_logprobs=plain["update"].get("old_logprobs", "policy"),
        max_completion_length=plain["rollout"]["max_completion_length"],
    )
    for finding in findings:
        if finding.kind == "no_effect" and not plain["allow_no_effect"]:
            no_effect(finding.message, plain)
        warn_or_refuse(finding)  # by the same line as the module, which asks again: a warning is shown once
