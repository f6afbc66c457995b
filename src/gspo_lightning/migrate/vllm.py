"""The vLLM keys of a GRPOConfig: which engine samples, and how its log-probabilities are corrected."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from gspo_lightning.errors import UserError

if TYPE_CHECKING:
    from gspo_lightning.migrate.convert import Conversion

Notes = dict[str, Any]
KEYS = (
    "use_vllm", "vllm_mode", "vllm_enable_sleep_mode", "vllm_gpu_memory_utilization", "vllm_server_base_url",
    "vllm_server_host", "vllm_server_port", "vllm_server_timeout", "vllm_tensor_parallel_size",
    "vllm_importance_sampling_correction", "vllm_importance_sampling_mode", "vllm_importance_sampling_clip_max",
    "vllm_importance_sampling_clip_min", "vllm_importance_sampling_cap",
)  # fmt: skip
_MODES = ("token_truncate", "token_mask", "sequence_truncate", "sequence_mask")
_CORRECTION = "vllm_importance_sampling_"


def rollout(config: dict[str, Any], result: Conversion, notes: Notes) -> None:
    """Converts to the config groups ``rollout`` and ``mismatch``."""
    if not config.get("use_vllm"):
        notes.update(dict.fromkeys(KEYS, ("same", "no effect without use_vllm, in TRL as here")))
        notes["use_vllm"] = ("same", "off: rollout=transformers")
        return
    server = config.get("vllm_mode", "colocate") == "server"
    name = result.groups["rollout"] = "vllm_server" if server else "vllm"
    notes["use_vllm"] = notes["vllm_mode"] = ("renamed", f"rollout={name}")
    unused = ("same", f"no effect with vllm_mode={'server' if server else 'colocate'}, in TRL as here")
    for key in KEYS[2:9]:
        notes[key] = unused
    (_server if server else _colocated)(config, result.settings, notes)
    if not server:
        kind = "no counterpart" if (config.get("vllm_tensor_parallel_size") or 1) > 1 else "same"
        why = "each rank has its own engine on its device; for a larger model start servers (rollout=vllm_server)"
        notes["vllm_tensor_parallel_size"] = (kind, why)
    _correction(config, result, notes)


def _colocated(config: dict[str, Any], settings: dict[str, Any], notes: Notes) -> None:
    settings["rollout.engine.memory_fraction"] = config.get("vllm_gpu_memory_utilization", 0.3)
    settings["rollout.engine.sleep"] = bool(config.get("vllm_enable_sleep_mode"))
    notes["vllm_gpu_memory_utilization"] = ("renamed", "rollout.engine.memory_fraction")
    notes["vllm_enable_sleep_mode"] = ("renamed", "rollout.engine.sleep")


def _server(config: dict[str, Any], settings: dict[str, Any], notes: Notes) -> None:
    host, port = config.get("vllm_server_host", "0.0.0.0"), config.get("vllm_server_port", 8000)
    # 0.0.0.0 is an address to listen on; the one to call is this machine.
    url = config.get("vllm_server_base_url") or f"http://{'127.0.0.1' if host == '0.0.0.0' else host}:{port}"
    settings["rollout.engine.urls"] = [url.rstrip("/")]
    settings["rollout.engine.ready_timeout_s"] = float(config.get("vllm_server_timeout") or 240.0)
    note = (
        "renamed",
        "rollout.engine.urls, a list: start the servers with scripts/serve_rollouts.sh, not `trl vllm-serve`",
    )
    for key in ("vllm_server_base_url", "vllm_server_host", "vllm_server_port"):
        notes[key] = note
    notes["vllm_server_timeout"] = ("renamed", "rollout.engine.ready_timeout_s")


def _correction(config: dict[str, Any], result: Conversion, notes: Notes) -> None:
    keys = [f"{_CORRECTION}{name}" for name in ("correction", "mode", "clip_max", "clip_min", "cap")]
    if not config.get(keys[0], True):
        result.groups["mismatch"] = "none"
        notes.update(dict.fromkeys(keys, ("renamed", "mismatch=none")))
        return
    mode = config.get(keys[1], "sequence_mask")
    if mode not in _MODES:
        notes[keys[1]] = ("no counterpart", f"modes are {', '.join(_MODES)}")
        return
    if config["loss_type"] == "vespo" and not mode.startswith("token"):
        raise UserError(
            f"{keys[1]}={mode}: loss_type=vespo takes weights of tokens into its own ratio; set {keys[1]} to "
            "token_truncate or token_mask, as TRL asks for too"
        )
    result.groups["mismatch"] = mode
    notes.update(dict.fromkeys(keys, ("renamed", f"mismatch={mode}, objective.mismatch.high and low")))
    high = config.get(keys[4]) or config.get(keys[2], 3.0)
    if high is None:
        notes[keys[2]] = ("no counterpart", "a correction without an upper bound; give one")
    else:
        result.settings["objective.mismatch.high"] = float(high)
    low = config.get(keys[3])
    if mode.endswith("mask"):
        result.settings["objective.mismatch.low"] = float(low or 0.0)
    elif low is not None:
        notes[keys[3]] = ("no counterpart", "truncation caps a weight from above; a small weight stays as it is")
