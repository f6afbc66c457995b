"""The keys of a GRPOConfig that say what the loss is: ratio, clip, weights and terms; and how rewards are compared."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gspo_lightning.migrate.steps import Config, Notes

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

_LOSSES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo", "cispo", "sapo", "vespo")
_OWN_KEYS = {
    "sapo": {"sapo_temperature_pos": "tau_positive", "sapo_temperature_neg": "tau_negative"},
    "vespo": {
        "vespo_k_pos": "k_positive", "vespo_lambda_pos": "lambda_positive",
        "vespo_k_neg": "k_negative", "vespo_lambda_neg": "lambda_negative",
    },
}  # fmt: skip
"""Losses with a smooth weight in place of a clip, and the settings of that."""
WITHOUT_CLIP = tuple(_OWN_KEYS)
_ENTROPY = {"entropy_target": 0.2, "entropy_coef_delta": 0.005, "entropy_coef_min": 0.0, "entropy_coef_max": 1.0}
"""TRL's defaults, which have an effect with ``use_adaptive_entropy`` alone."""


def objective(config: Config, given: Config, result: Conversion, notes: Notes) -> None:
    """Converts the loss, its clip and KL term, and the advantages."""
    loss, level = config["loss_type"], config["importance_sampling_level"]
    if loss not in _LOSSES:
        notes["loss_type"] = ("no counterpart", f"losses are {', '.join(_LOSSES)}")
        return
    result.groups["objective"] = loss if loss in WITHOUT_CLIP else "grpo"
    notes["loss_type"] = ("same", "objective.loss_type")
    settings = result.settings
    settings["objective.loss_type"] = loss
    for key in ("epsilon", "epsilon_high", "delta"):
        settings[f"objective.{key}"] = None if loss in WITHOUT_CLIP else config.get(key)
        no_clip = ("better default", f"{loss} has a smooth weight in place of the clip; TRL ignores it silently")
        notes[key] = no_clip if loss in WITHOUT_CLIP else ("same", f"objective.{key}")
    if loss == "cispo":
        _one_cap(config, given, result, notes)
    elif level != "token" and "epsilon" not in given and loss not in WITHOUT_CLIP:
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
    if steps > 1 or corrected or loss not in WITHOUT_CLIP:
        return
    for key, ours in _OWN_KEYS[loss].items():
        if result.settings.pop(f"objective.{ours}", None) is not None:
            notes[key] = ("same", "no effect with one optimizer step per rollout: the ratio is 1, in TRL as here")
