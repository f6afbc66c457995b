"""A GRPOConfig that samples with vLLM: the engine's group, its settings, and the correction."""

from __future__ import annotations

import pytest

from gspo_lightning.errors import UserError
from gspo_lightning.migrate import convert
from tests.migrate.test_from_trl import checked

COLOCATED = {"use_vllm": True, "vllm_gpu_memory_utilization": 0.4, "vllm_enable_sleep_mode": True}
SERVER = {"use_vllm": True, "vllm_mode": "server", "vllm_server_host": "10.0.0.7", "vllm_server_port": 8001}


def test_colocated_becomes_the_engine_in_process_with_trls_correction():
    result = convert(COLOCATED)
    assert result.groups["rollout"] == "vllm" and result.groups["mismatch"] == "sequence_mask"
    assert result.settings["rollout.engine.memory_fraction"] == 0.4 and result.settings["rollout.engine.sleep"] is True
    assert result.settings["objective.mismatch.high"] == 3.0 and not result.blocking and not result.remainder


def test_a_server_keeps_its_address_and_the_run_passes_the_checks():
    correction = {"vllm_importance_sampling_mode": "token_mask", "vllm_importance_sampling_clip_min": 0.2}
    plain = checked({**SERVER, **correction, "vllm_server_timeout": 30.0, "epsilon": 0.2, "steps_per_generation": 8})
    engine, mismatch = plain["rollout"]["engine"], plain["objective"]["mismatch"]
    assert engine["urls"] == ["http://10.0.0.7:8001"] and engine["ready_timeout_s"] == 30.0
    assert (mismatch["level"], mismatch["how"], mismatch["high"], mismatch["low"]) == ("token", "mask", 3.0, 0.2)
    assert convert({**SERVER, "vllm_server_base_url": "http://gpu:9/"}).settings["rollout.engine.urls"] == [
        "http://gpu:9"
    ]
    default = convert({"use_vllm": True, "vllm_mode": "server"}).settings["rollout.engine.urls"]
    assert default == ["http://127.0.0.1:8000"]  # what listens on 0.0.0.0 is called here


@pytest.mark.parametrize(
    ("given", "key"),
    [
        ({**COLOCATED, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size"),
        ({**COLOCATED, "vllm_importance_sampling_clip_max": None}, "vllm_importance_sampling_clip_max"),
        (
            {**COLOCATED, "vllm_importance_sampling_mode": "token_truncate", "vllm_importance_sampling_clip_min": 0.5},
            "vllm_importance_sampling_clip_min",
        ),
        ({**COLOCATED, "vllm_importance_sampling_mode": "icepop"}, "vllm_importance_sampling_mode"),
    ],
)
def test_what_has_no_counterpart_blocks_and_is_named(given, key):
    assert convert(given).blocking == [key]


def test_without_vllm_its_keys_ask_for_nothing():
    result = convert({"vllm_mode": "server", "vllm_gpu_memory_utilization": 0.9, "vllm_importance_sampling_cap": 2.0})
    assert "rollout" not in result.groups and "mismatch" not in result.groups and not result.blocking
    assert {v.kind for v in result.verdicts} == {"same"}


def test_a_mask_has_no_lower_bound_that_was_not_asked_for():
    mask = {**COLOCATED, "vllm_importance_sampling_mode": "token_mask"}
    assert convert(mask).settings["objective.mismatch.low"] == 0.0
    assert convert({**mask, "vllm_importance_sampling_clip_min": 0.5}).settings["objective.mismatch.low"] == 0.5
    plain = checked({**SERVER, "vllm_importance_sampling_mode": "token_mask"})
    assert (plain["objective"]["mismatch"]["low"], plain["objective"]["mismatch"]["high"]) == (0.0, 3.0)


SEQUENCE = {**SERVER, "loss_type": "grpo", "importance_sampling_level": "sequence", "steps_per_generation": 8}


def test_a_mask_of_tokens_under_a_sequence_ratio_gets_the_level_at_which_it_leaves_tokens_out():
    given = {**SEQUENCE, "vllm_importance_sampling_mode": "token_mask"}
    plain = checked(given)
    assert plain["objective"]["importance_sampling_level"] == "sequence_token"
    assert plain["objective"]["mismatch"]["how"] == "mask"
    why = "sequence_token: with sequence, vllm_importance_sampling_mode would scale whole completions, as in TRL"
    (verdict,) = [v for v in convert(given).verdicts if v.key == "importance_sampling_level"]
    assert (verdict.kind, verdict.note) == ("better default", why)
    assert f"objective.importance_sampling_level={why}" in convert(given).added


def test_a_capped_weight_of_tokens_under_a_sequence_ratio_stays_and_is_said():
    given = {**SEQUENCE, "vllm_importance_sampling_mode": "token_truncate"}
    with pytest.warns(UserWarning, match="weighs each completion by the mean of its weights"):
        assert checked(given)["objective"]["importance_sampling_level"] == "sequence"
    assert [note for note in convert(given).added if "weighs a completion by the mean" in note]
    masked = convert({**SEQUENCE, "vllm_importance_sampling_mode": "sequence_mask"})
    assert masked.settings["objective.importance_sampling_level"] == "sequence"
    assert not [note for note in masked.added if "token" in note.split(":")[0]]


def test_one_engine_per_rank_is_what_a_tensor_parallel_size_of_one_asks_for():
    (verdict,) = [v for v in convert({**COLOCATED, "vllm_tensor_parallel_size": 1}).verdicts if "tensor" in v.key]
    assert verdict.kind == "same" and "each rank has its own engine" in verdict.note


@pytest.mark.parametrize("mode", [None, "sequence_mask", "sequence_truncate"])
def test_a_correction_per_completion_is_refused_for_vespo_as_trl_does(mode):
    given = {**COLOCATED, "loss_type": "vespo"} | ({"vllm_importance_sampling_mode": mode} if mode else {})
    line = f"vllm_importance_sampling_mode={mode or 'sequence_mask'}: loss_type=vespo takes weights of tokens"
    with pytest.raises(UserError, match=line):
        convert(given)
    assert convert({**given, "vllm_importance_sampling_correction": False}).groups["mismatch"] == "none"


@pytest.mark.parametrize("mode", ["token_mask", "token_truncate"])
def test_a_correction_per_token_goes_into_the_ratio_of_vespo(mode):
    plain = checked({**SERVER, "loss_type": "vespo", "vllm_importance_sampling_mode": mode})
    assert plain["objective"]["mismatch"]["level"] == "token" and plain["objective"]["loss_type"] == "vespo"


def test_no_correction_is_no_correction():
    assert convert({**COLOCATED, "vllm_importance_sampling_correction": False}).groups["mismatch"] == "none"
