"""The keys of a GRPOConfig whose translation depends on their value or on other keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from gspo_lightning.errors import UserError

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

Config = dict[str, Any]
Notes = dict[str, Any]

_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_SCHEDULERS = {
    "constant": "constant", "constant_with_warmup": "constant", "linear": "linear", "cosine": "cosine",
    "cosine_with_min_lr": "cosine",
}  # fmt: skip
_LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo")
_LOGGERS = ("tensorboard", "wandb", "mlflow", "none")
PAPER_MINIBATCHES = 4
"""Optimizer steps per rollout in the GSPO paper."""


def optimization(config: Config, given: Config, result: Conversion, notes: Notes, ranks: int) -> None:
    """Batch sizes, length of the run, optimizer and schedule."""
    steps = _batches(config, result, notes, ranks)
    _length(config, result, notes, steps)
    _optimizer(config, result, notes)
    _schedule(config, result, notes, steps)


def _batches(config: Config, result: Conversion, notes: Notes, ranks: int) -> int:
    """Prompts per rollout and minibatches; returns TRL's optimizer steps per rollout."""
    accumulation, per_device = config["gradient_accumulation_steps"], config["per_device_train_batch_size"]
    generation, steps_per_generation = config.get("generation_batch_size"), config.get("steps_per_generation")
    if generation and steps_per_generation:
        raise UserError("generation_batch_size and steps_per_generation exclude each other; remove one")
    completions = generation or per_device * ranks * (steps_per_generation or accumulation)
    group = config["num_generations"]
    per_step = per_device * ranks * accumulation
    if completions % group:
        raise UserError(
            f"{completions} completions per rollout (per_device_train_batch_size x ranks x steps) are no multiple of "
            f"num_generations={group}; TRL refuses that too"
        )
    prompts, minibatches = completions // group, max(1, completions // per_step)
    result.settings |= {"data.prompts_per_rollout": prompts, "update.num_minibatches": minibatches}
    steps = minibatches * config["num_iterations"]
    if prompts % minibatches:
        raise UserError(
            f"an optimizer step of {per_step} completions does not hold whole groups of num_generations={group}; ours "
            "do: change the batch size"
        )
    why = f"data.prompts_per_rollout={prompts}: {completions} completions / {group}; "
    why += "memory: update.max_tokens_per_microbatch"
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"):
        notes[key] = ("renamed", why)
    notes["generation_batch_size"] = ("renamed", why)
    if steps == 1 and config["loss_type"] != "sapo":
        _let_the_clip_act(prompts, result)
    longest = config.get("max_prompt_length") or 512
    result.settings["data.max_prompt_length"] = longest
    if "max_prompt_length" not in config:
        result.added.append("data.max_prompt_length=512: TRL 1.16 has no limit; ours refuses a longer prompt by name")
    return steps


def _let_the_clip_act(prompts: int, result: Conversion) -> None:
    """With one step per rollout the ratio is exactly 1: TRL runs that in silence, we would refuse it."""
    why = "one optimizer step per rollout, as written, makes every ratio exactly 1, so that no clip could ever act"
    if prompts > 1:
        most = max(n for n in range(2, PAPER_MINIBATCHES + 1) if prompts % n == 0) if _divides(prompts) else prompts
        result.settings["update.num_minibatches"] = most
        result.added.append(
            f"update.num_minibatches={most}: {why}; of {prompts} prompts, each step sees {prompts // most}"
        )
    else:
        result.settings["update.num_iterations"] = 2
        result.added.append(f"update.num_iterations=2: {why}; one prompt per rollout cannot be divided")


def _divides(prompts: int) -> bool:
    return any(prompts % n == 0 for n in range(2, PAPER_MINIBATCHES + 1))


def _length(config: Config, result: Conversion, notes: Notes, steps: int) -> None:
    maximum = config.get("max_steps") or -1
    if maximum > 0:
        result.settings["max_rollouts"] = math.ceil(maximum / steps)
        notes["max_steps"] = ("renamed", f"max_rollouts: {maximum} optimizer steps of TRL, {steps} per rollout")
        notes["num_train_epochs"] = ("same", "max_steps goes before it, as in TRL")
    else:
        epochs = config["num_train_epochs"]
        result.settings["num_epochs"] = int(epochs) if float(epochs).is_integer() else epochs
        result.settings["max_rollouts"] = None  # whatever recipe these settings are laid over
        notes["num_train_epochs"] = ("renamed", "num_epochs")
        notes["max_steps"] = ("same", "not positive: the epochs count")


def _optimizer(config: Config, result: Conversion, notes: Notes) -> None:
    name = str(config["optim"])
    if name in _OPTIMIZERS:
        result.groups["optimizer"] = _OPTIMIZERS[name]
        notes["optim"] = ("renamed", f"optimizer={_OPTIMIZERS[name]}")
    else:
        notes["optim"] = ("no counterpart", "write a config group conf/optimizer/<name>.yaml that names its class")
    result.settings["optimizer.betas"] = [config["adam_beta1"], config["adam_beta2"]]
    notes["adam_beta1"] = notes["adam_beta2"] = ("renamed", "optimizer.betas")


def _schedule(config: Config, result: Conversion, notes: Notes, steps: int) -> None:
    name = str(config["lr_scheduler_type"])
    extra = config.get("lr_scheduler_kwargs") or {}
    if name not in _SCHEDULERS:
        notes["lr_scheduler_type"] = ("no counterpart", f"schedules are {', '.join(sorted(set(_SCHEDULERS.values())))}")
        return
    result.groups["scheduler"] = _SCHEDULERS[name]
    notes["lr_scheduler_type"] = ("renamed", f"scheduler={_SCHEDULERS[name]}")
    notes["lr_scheduler_kwargs"] = ("same", "empty")
    if name == "cosine_with_min_lr" and set(extra) == {"min_lr_rate"}:
        result.settings["scheduler.min_ratio"] = extra["min_lr_rate"]
        notes["lr_scheduler_kwargs"] = ("renamed", "scheduler.min_ratio")
    elif extra:
        notes["lr_scheduler_kwargs"] = ("no counterpart", "scheduler.min_ratio alone, from min_lr_rate")
    warmup, ratio = config.get("warmup_steps") or 0, config.get("warmup_ratio")
    if ratio is None and warmup >= 1:
        if (config.get("max_steps") or -1) <= 0:
            notes["warmup_steps"] = ("no counterpart", "a share of the run: scheduler.warmup_ratio; give max_steps")
            return
        ratio = warmup / config["max_steps"]
    ratio = float(warmup if ratio is None else ratio)
    if ratio:
        result.settings["scheduler.warmup_ratio"] = ratio
    notes["warmup_steps"] = notes["warmup_ratio"] = ("renamed", "scheduler.warmup_ratio, a share of all steps")


def objective(config: Config, given: Config, result: Conversion, notes: Notes) -> None:
    """The loss, its clip and its KL term, the advantages."""
    loss, level = config["loss_type"], config["importance_sampling_level"]
    if loss not in _LOSSES:
        notes["loss_type"] = ("no counterpart", f"losses are {', '.join(_LOSSES)}")
        return
    result.groups["objective"] = "sapo" if loss == "sapo" else "grpo"
    notes["loss_type"] = ("same", "objective.loss_type")
    settings = result.settings
    settings["objective.loss_type"] = loss
    for key in ("epsilon", "epsilon_high", "delta"):
        settings[f"objective.{key}"] = None if loss == "sapo" else config.get(key)
        no_clip = ("better default", "sapo has a gate in place of the clip; TRL ignores it in silence")
        notes[key] = no_clip if loss == "sapo" else ("same", f"objective.{key}")
    if loss == "cispo":
        settings["objective.epsilon"] = settings["objective.delta"] = None
        one_cap = ("better default", "cispo caps the ratio from above alone: objective.epsilon_high")
        notes["epsilon"] = notes["delta"] = one_cap
    elif level != "token" and "epsilon" not in given and loss != "sapo":
        settings["objective.epsilon"] = None
        result.added.append("objective.epsilon=null: the paper's 3e-4 / 4e-4; TRL's default 0.2 never binds a sequence")
    for key, ours in (("sapo_temperature_pos", "tau_positive"), ("sapo_temperature_neg", "tau_negative")):
        notes[key] = ("renamed", f"objective.{ours}")
        if loss == "sapo" and key in given:
            settings[f"objective.{ours}"] = config[key]
    notes["use_bias_correction_kl"] = ("renamed", "objective.kl_importance_weighted; matters with beta alone")
    if config["beta"]:
        settings["objective.kl_importance_weighted"] = config.get("use_bias_correction_kl", True)
    if loss == "dr_grpo" and level != "token":
        result.added.append(
            "note: dr_grpo with a sequence ratio weighs long answers more; the paper's is loss_type=grpo"
        )
    scale = {True: "group", False: "none"}.get(config["scale_rewards"], config["scale_rewards"])
    settings["advantages.scale_rewards"] = scale
    notes["scale_rewards"] = ("same", "advantages.scale_rewards")
    combine = config.get("multi_objective_aggregation", "sum_then_normalize")
    settings["reward.combine"] = "normalize_then_sum" if combine == "normalize_then_sum" else "weighted_sum"
    notes["multi_objective_aggregation"] = ("renamed", "reward.combine")


def running(config: Config, given: Config, result: Conversion, notes: Notes) -> None:
    """Precision, saving, validation, logging, sampling details."""
    settings = result.settings
    if config.get("fp16"):
        notes["fp16"] = ("no counterpart", "float16 needs a loss scale, which a ratio clip does not survive; use bf16")
    else:
        notes["fp16"] = ("same", "off")
    notes["bf16"] = ("renamed", "trainer.precision")
    if config.get("bf16") is not None:
        settings["trainer.precision"] = "bf16-mixed" if config["bf16"] else "32-true"
    notes["use_cpu"] = ("renamed", "trainer.accelerator")
    if config.get("use_cpu"):
        settings["trainer.accelerator"] = "cpu"
    _every(config, notes, settings, "save", "checkpoint.every_n_rollouts")
    _every(config, notes, settings, "eval", "validation.every_n_rollouts")
    _moving_reference(config, notes, settings)
    _logger(config, result, notes)
    notes["min_p"] = ("same", "rollout.min_p")
    if config.get("min_p"):
        settings["rollout.min_p"] = config["min_p"]
    notes["chat_template_kwargs"] = ("same", "data.chat_template_kwargs")
    for key, value in (config.get("chat_template_kwargs") or {}).items():
        settings[f"+data.chat_template_kwargs.{key}"] = value
    resume = config.get("resume_from_checkpoint")
    notes["resume_from_checkpoint"] = ("better default", "ckpt_path takes a checkpoint of ours, never one of TRL")
    if not resume:
        notes["resume_from_checkpoint"] = ("same", "off")
    _hub(config, result, notes)


def _hub(config: Config, result: Conversion, notes: Notes) -> None:
    """The upload at the end, where a repository is named; a public one is made only where that is asked for."""
    repository, wanted = config.get("hub_model_id"), bool(config.get("push_to_hub"))
    off = ("same", "nothing is uploaded")
    notes["push_to_hub"] = ("renamed", "export.push_to_hub, which names the repository") if wanted else off
    notes["hub_model_id"] = ("renamed", "export.push_to_hub") if wanted else off
    notes["hub_private_repo"] = ("renamed", "export.private, true unless false is given") if wanted else off
    if not wanted:
        return
    if not repository:
        result.added.append("export.push_to_hub=me/my-model is for you to add: TRL takes the folder's name")
        return
    result.settings["export.push_to_hub"] = repository
    if config.get("hub_private_repo") is False:
        result.settings["export.private"] = False


def _moving_reference(config: Config, notes: Notes, settings: Config) -> None:
    steps, alpha = config.get("ref_model_sync_steps") or 512, config.get("ref_model_mixup_alpha") or 0.6
    every = max(1, round(steps / (settings["update.num_minibatches"] * settings["update.num_iterations"])))
    notes["sync_ref_model"] = notes["ref_model_sync_steps"] = (
        "renamed",
        "update.ref_sync_every_n_rollouts, in rollouts",
    )
    notes["ref_model_mixup_alpha"] = ("same", "update.ref_model_mixup_alpha")
    if config.get("sync_ref_model"):
        settings |= {"update.ref_sync_every_n_rollouts": every, "update.ref_model_mixup_alpha": alpha}


def _every(config: Config, notes: Notes, settings: Config, what: str, ours: str) -> None:
    strategy, steps = config.get(f"{what}_strategy"), config.get(f"{what}_steps")
    per_rollout = settings.get("update.num_minibatches", 1) * settings.get("update.num_iterations", 1)
    notes[f"{what}_strategy"] = ("renamed", ours)
    notes[f"{what}_steps"] = ("renamed", f"{ours}, in rollouts of {per_rollout} steps")
    if strategy in ("epoch", "best"):
        notes[f"{what}_strategy"] = ("better default", f"{ours}: rollouts, not epochs; the end is always included")
    elif strategy == "no" or (what == "eval" and strategy is None):
        notes[f"{what}_strategy"] = ("better default", "before and after the run, always")
    elif steps and steps >= 1:
        settings[ours] = max(1, round(steps / per_rollout))


def _logger(config: Config, result: Conversion, notes: Notes) -> None:
    wanted = config.get("report_to")
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    notes["report_to"] = ("renamed", f"logger={names[0]}" if len(names) == 1 else "logger")
    if len(names) == 1 and names[0] in _LOGGERS:
        result.groups["logger"] = names[0]
    elif names and names != ["all"]:
        notes["report_to"] = (
            "better default",
            "logger=tensorboard, wandb, mlflow, csv or none; several: compose a group",
        )
