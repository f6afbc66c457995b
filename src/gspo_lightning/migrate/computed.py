"""The keys of a GRPOConfig whose translation depends on their value or on other keys; the loss is in `losses.py`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gspo_lightning.errors import UserError
from gspo_lightning.migrate.losses import WITHOUT_CLIP
from gspo_lightning.migrate.steps import Config, Notes, intervals, length, schedule
from gspo_lightning.screen import counted

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_LOGGERS = ("tensorboard", "wandb", "mlflow", "none")
PAPER_MINIBATCHES = 4
"""Optimizer steps per rollout in the GSPO paper."""


def optimization(config: Config, result: Conversion, notes: Notes, ranks: int) -> int:
    """Converts batch sizes, run length, optimizer and schedule; returns TRL's optimizer steps per rollout."""
    steps = _batches(config, result, notes, ranks)
    length(config, result, notes, steps)
    _optimizer(config, result, notes)
    schedule(config, result, notes)
    return steps


def _batches(config: Config, result: Conversion, notes: Notes, ranks: int) -> int:
    """Converts batch sizes to prompts per rollout and minibatches; returns TRL's optimizer steps per rollout."""
    accumulation, per_device = config["gradient_accumulation_steps"], config["per_device_train_batch_size"]
    generation, steps_per_generation = config.get("generation_batch_size"), config.get("steps_per_generation")
    completions = generation or per_device * ranks * (steps_per_generation or accumulation)
    if steps_per_generation and completions != per_device * ranks * steps_per_generation:  # a dumped config has both
        raise UserError(
            f"generation_batch_size={generation} and steps_per_generation={steps_per_generation} contradict each other "
            f"with {counted(ranks, 'rank')} of per_device_train_batch_size={per_device}; remove one, or correct --ranks"
        )
    group = config["num_generations"]
    per_step = per_device * ranks * accumulation
    if completions % group:
        raise UserError(
            f"{completions} completions per rollout (per_device_train_batch_size x ranks x steps) are not a multiple "
            f"of num_generations={group}; TRL refuses that too"
        )
    if completions % per_step:
        raise UserError(
            f"{completions} completions per rollout are not a multiple of the {per_step} of an optimizer step "
            "(per_device_train_batch_size x ranks x gradient_accumulation_steps), so that a step would span two "
            "rollouts; make steps_per_generation a multiple of gradient_accumulation_steps"
        )
    prompts, minibatches = completions // group, completions // per_step
    result.settings |= {"data.prompts_per_rollout": prompts, "update.num_minibatches": minibatches}
    steps = minibatches * config["num_iterations"]
    if prompts % minibatches:
        raise UserError(
            f"an optimizer step of {per_step} completions does not hold whole groups of num_generations={group}, as "
            "steps must here; change the batch size"
        )
    why = f"data.prompts_per_rollout={prompts}: {completions} completions / {group}; "
    why += "memory: update.max_tokens_per_microbatch"
    for key in ("per_device_train_batch_size", "gradient_accumulation_steps", "steps_per_generation"):
        notes[key] = ("renamed", why)
    notes["generation_batch_size"] = ("renamed", why)
    if steps == 1 and config["loss_type"] not in WITHOUT_CLIP:
        _let_the_clip_act(prompts, result)
    longest = config.get("max_prompt_length") or 512
    result.settings["data.max_prompt_length"] = longest
    if "max_prompt_length" not in config:
        result.added.append(
            "data.max_prompt_length=512: TRL 1.16 has no limit; a longer prompt is refused here, by name"
        )
    return steps


def _let_the_clip_act(prompts: int, result: Conversion) -> None:
    """Divides a rollout with one step, whose ratios would be exactly 1: TRL accepts that silently, we refuse it."""
    why = "one optimizer step per rollout, as written, makes every ratio exactly 1, so that no clip could ever act"
    if prompts > 1:
        most = max((n for n in range(2, PAPER_MINIBATCHES + 1) if prompts % n == 0), default=prompts)
        result.settings["update.num_minibatches"] = most
        result.added.append(
            f"update.num_minibatches={most}: {why}; of {prompts} prompts, each step sees {prompts // most}"
        )
    else:
        result.settings["update.num_iterations"] = 2
        result.added.append(f"update.num_iterations=2: {why}; one prompt per rollout cannot be divided")


def _optimizer(config: Config, result: Conversion, notes: Notes) -> None:
    name = str(config["optim"])
    if name in _OPTIMIZERS:
        result.groups["optimizer"] = _OPTIMIZERS[name]
        notes["optim"] = ("renamed", f"optimizer={_OPTIMIZERS[name]}")
    else:
        notes["optim"] = ("no counterpart", "write a config group conf/optimizer/<name>.yaml that names its class")
    norm = config["max_grad_norm"]
    if norm is None or not norm > 0:  # TRL clips only for values above 0
        result.settings["update.max_grad_norm"] = math.inf
    result.settings["optimizer.betas"] = [config["adam_beta1"], config["adam_beta2"]]
    notes["adam_beta1"] = notes["adam_beta2"] = ("renamed", "optimizer.betas")


def running(config: Config, result: Conversion, notes: Notes, steps: int) -> None:
    """Converts precision, saving, validation, logging and more; ``steps``: TRL's optimizer steps per rollout."""
    settings = result.settings
    if config.get("fp16"):
        notes["fp16"] = (
            "no counterpart",
            "float16 needs loss scaling, which does not work with a ratio clip; use bf16",
        )
    else:
        notes["fp16"] = ("same", "off")
    notes["bf16"] = ("renamed", "trainer.precision")
    if config.get("bf16") is not None:
        settings["trainer.precision"] = "bf16-mixed" if config["bf16"] else "32-true"
    notes["use_cpu"] = ("renamed", "trainer.accelerator")
    if config.get("use_cpu"):
        settings["trainer.accelerator"] = "cpu"
    intervals(config, settings, notes, steps)
    _logger(config, result, notes)
    if config["top_k"] is not None:
        settings["rollout.top_k"] = max(0, config["top_k"])  # -1 keeps all, as 0 does
    if config.get("repetition_penalty") not in (None, 1.0):
        notes["repetition_penalty"] = (
            "no counterpart",
            "the penalty depends on the history: ratios would be those of another policy",
        )
    notes["min_p"] = ("same", "rollout.min_p")
    if config.get("min_p"):
        settings["rollout.min_p"] = config["min_p"]
    notes["chat_template_kwargs"] = ("same", "data.chat_template_kwargs")
    for key, value in (config.get("chat_template_kwargs") or {}).items():
        settings[f"+data.chat_template_kwargs.{key}"] = value
    resume = config.get("resume_from_checkpoint")
    notes["resume_from_checkpoint"] = (
        "better default",
        "ckpt_path takes a checkpoint of gspo_lightning, never one of TRL",
    )
    if not resume:
        notes["resume_from_checkpoint"] = ("same", "off")
    _hub(config, result, notes)


def _hub(config: Config, result: Conversion, notes: Notes) -> None:
    """Converts the upload at the end, if a repository is named; it is public only if the config asks for that."""
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


def _logger(config: Config, result: Conversion, notes: Notes) -> None:
    wanted = config.get("report_to")
    names = [wanted] if isinstance(wanted, str) else list(wanted or [])
    notes["report_to"] = ("renamed", f"logger={names[0]}" if len(names) == 1 else "logger")
    if len(names) == 1 and names[0] in _LOGGERS:
        result.groups["logger"] = names[0]
    elif names:
        notes["report_to"] = (
            "better default",
            "logger=tensorboard, wandb, mlflow, csv or none; several: compose a group",
        )
