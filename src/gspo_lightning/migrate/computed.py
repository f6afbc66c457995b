"""The keys of a GRPOConfig whose translation depends on their value or on other keys."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from gspo_lightning.errors import UserError
from gspo_lightning.migrate.steps import Config, Notes, intervals, length, schedule
from gspo_lightning.screen import counted

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

_OPTIMIZERS = {
    "adamw_torch": "adamw", "adamw_torch_fused": "adamw",
    "adamw_8bit": "adamw_8bit", "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit",
}  # fmt: skip
_LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_OWN_KEYS = {
    "sapo": {"sapo_temperature_pos": "tau_positive", "sapo_temperature_neg": "tau_negative"},
    "vespo": {
        "vespo_k_pos": "k_positive", "vespo_lambda_pos": "lambda_positive",
        "vespo_k_neg": "k_negative", "vespo_lambda_neg": "lambda_negative",
    },
}  # fmt: skip
"""Losses with a smooth weight in place of a clip, and the settings of that."""
_WITHOUT_CLIP = tuple(_OWN_KEYS)
_ENTROPY = {"entropy_target": 0.2, "entropy_coef_delta": 0.005, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0}
"""TRL's defaults, which have an effect with ``use_adaptive_entropy`` alone."""
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
    if steps == 1 and config["loss_type"] not in _WITHOUT_CLIP:
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


def objective(config: Config, given: Config, result: Conversion, notes: Notes) -> None:
    """Converts the loss, its clip and KL term, and the advantages."""
    loss, level = config["loss_type"], config["importance_sampling_level"]
    if loss not in _LOSSES:
        notes["loss_type"] = ("no counterpart", f"losses are {', '.join(_LOSSES)}")
        return
    result.groups["objective"] = loss if loss in _WITHOUT_CLIP else "grpo"
    notes["loss_type"] = ("same", "objective.loss_type")
    settings = result.settings
    settings["objective.loss_type"] = loss
    for key in ("epsilon", "epsilon_high", "delta"):
        settings[f"objective.{key}"] = None if loss in _WITHOUT_CLIP else config.get(key)
        no_clip = ("better default", f"{loss} has a smooth weight in place of the clip; TRL ignores it silently")
        notes[key] = no_clip if loss in _WITHOUT_CLIP else ("same", f"objective.{key}")
    if loss == "cispo":
        _one_cap(config, given, result, notes)
    elif level != "token" and "epsilon" not in given and loss not in _WITHOUT_CLIP:
        settings["objective.epsilon"] = None
        result.added.append("objective.epsilon=null: the paper's 3e-4 / 4e-4; TRL's default 0.2 never clips a sequence")
    _own_keys(config, result, notes)
    _entropy(config, result, notes)
    notes["use_bias_correction_kl"] = ("renamed", "objective.kl_importance_weighted; matters only with beta")
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
    if combine == "normalize_then_sum":
        settings["advantages.scale_rewards"] = "batch"
        notes["scale_rewards"] = ("renamed", "batch: TRL scales normalize_then_sum by the batch whatever this says")
        if "scale_rewards" not in given:
            result.added.append("advantages.scale_rewards=batch: what normalize_then_sum does in TRL")


def _entropy(config: Config, result: Conversion, notes: Notes) -> None:
    """Converts adaptive entropy control, whose settings TRL has whether it is on or off."""
    if (config.get("top_entropy_quantile") or 1) < 1 and (
        config.get("entropy_coef") or config.get("use_adaptive_entropy")
    ):
        result.added.append(
            "note: the entropy bonus and its target are of all tokens; in TRL of those that top_entropy_quantile keeps"
        )
    if not config.get("use_adaptive_entropy"):
        notes["use_adaptive_entropy"] = ("same", "off")
        notes |= dict.fromkeys(_ENTROPY, ("same", "no effect without use_adaptive_entropy, in TRL as here"))
        return
    notes["use_adaptive_entropy"] = ("renamed", "objective.entropy_target")
    for key, default in _ENTROPY.items():
        value = config.get(key)
        notes[key] = ("same", f"objective.{key}")
        result.settings[f"objective.{key}"] = default if value is None else value


def _own_keys(config: Config, result: Conversion, notes: Notes) -> None:
    """Converts the settings of losses without a clip, and the ratio level, which is no choice for ``vespo``."""
    loss = config["loss_type"]
    for of, keys in _OWN_KEYS.items():
        for key, ours in keys.items():
            value = config.get(key)
            if loss != of:
                notes[key] = ("same", f"no effect without loss_type={of}, in TRL as here")
            elif value is not None and not value > 0:
                notes[key] = ("no counterpart", f"objective.{ours} must be above 0; TRL does not check it")
            else:
                notes[key] = ("renamed", f"objective.{ours}")
                if value is not None:
                    result.settings[f"objective.{ours}"] = value
    if loss == "vespo" and config["importance_sampling_level"] != "token":
        result.settings["objective.importance_sampling_level"] = "token"
        why = "token: vespo has a ratio of its own, of the whole sequence; TRL warns and ignores it too"
        notes["importance_sampling_level"] = ("better default", why)


def _one_cap(config: Config, given: Config, result: Conversion, notes: Notes) -> None:
    """Converts the one bound of cispo; TRL takes ``epsilon`` for it if ``epsilon_high`` is not given."""
    cap = config.get("epsilon_high")
    result.settings |= {"objective.epsilon": None, "objective.delta": None}
    notes["delta"] = ("better default", "cispo caps the ratio only from above: objective.epsilon_high")
    notes["epsilon"] = notes["delta"]
    if cap is None and "epsilon" in given:
        result.settings["objective.epsilon_high"] = config["epsilon"]
        notes["epsilon"] = ("renamed", "objective.epsilon_high, which TRL takes from it for cispo")
    elif cap is None:
        result.added.append("objective.epsilon_high=null: 5; TRL takes epsilon=0.2, which caps every token of cispo")


def single_tokens(config: Config, result: Conversion, notes: Notes) -> None:
    """Handles token masks, which TRL allows under a sequence ratio too, where they only scale whole completions."""
    if result.settings["objective.importance_sampling_level"] != "sequence":
        return
    mismatch = result.groups.get("mismatch")
    chosen = {"top_entropy_quantile": (config.get("top_entropy_quantile") or 1.0) < 1}
    chosen["vllm_importance_sampling_mode"] = mismatch == "token_mask"
    masks = [key for key, is_chosen in chosen.items() if is_chosen]
    if masks and config["loss_type"] == "sapo":
        why = "leaves no token out with the sequence ratio of sapo, in TRL as here; use importance_sampling_level=token"
        notes.update(dict.fromkeys(masks, ("no counterpart", why)))
    elif masks:
        result.settings["objective.importance_sampling_level"] = "sequence_token"
        why = f"sequence_token: with sequence, {' and '.join(masks)} would scale whole completions, as in TRL"
        notes["importance_sampling_level"] = ("better default", why)
        result.added.append(f"objective.importance_sampling_level={why}")
    elif mismatch == "token_truncate":
        result.added.append(
            "note: with a sequence ratio, token_truncate weighs a completion by the mean of its tokens' weights"
        )


def smooth_weights(config: Config, result: Conversion, notes: Notes, steps: int) -> None:
    """Leaves out the settings of a weight that is always 1: with one step per rollout so is the ratio, unless it takes
    in a correction for another sampler."""
    loss = config["loss_type"]
    corrected = loss == "vespo" and result.groups.get("mismatch", "none") != "none"
    if steps > 1 or corrected or loss not in _WITHOUT_CLIP:
        return
    for key, ours in _OWN_KEYS[loss].items():
        if result.settings.pop(f"objective.{ours}", None) is not None:
            notes[key] = ("same", "no effect with one optimizer step per rollout: the ratio is 1, in TRL as here")


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
