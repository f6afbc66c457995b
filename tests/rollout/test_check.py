"""What our caches do not decode exactly is sampled by the model's own `generate`."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.rollout import TransformersEngine, VLLMServerEngine
from gspo_lightning.rollout.block_cache import BlockCache
from gspo_lightning.rollout.check import check_decoding, choose_decoding
from gspo_lightning.rollout.turns import refuse_padded
from gspo_lightning.training.loading import choose_forwards
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy, padded_logprobs
from tests.training.test_one_step_off import Elsewhere
from tests.vision.models import vision_policy


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
def test_a_known_architecture_passes(dtype, bound, micro_model_dir):
    assert check_decoding(micro_policy(micro_model_dir, dtype)) < bound


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_a_prompt_with_an_image_passes(family):
    assert check_decoding(vision_policy(family)) < 1e-6


def test_a_model_that_changes_its_values_after_the_cache_samples_by_itself(micro_model_dir, monkeypatch):
    """As DiffLlama does; its packed forward, which has no cache, is exact."""
    attend = BlockCache.attend
    monkeypatch.setattr(BlockCache, "attend", lambda *args, **kwargs: 0.5 * attend(*args, **kwargs))
    policy = micro_policy(micro_model_dir)

    def chosen(engine):
        choose_forwards(SimpleNamespace(policy=policy, engine=engine, references=[], forward_chosen=False))
        return policy.is_padded, policy.samples_padded

    assert chosen(VLLMServerEngine(["http://127.0.0.1:9"], 8, 8)) == (False, False)
    assert chosen(Elsewhere()) == (False, False), "an engine that does not say that it decodes here"
    with pytest.warns(
        UserWarning, match=r"decoded log-probabilities are .* away, .*sampling by the model's own generate"
    ):
        assert chosen(TransformersEngine()) == (False, True)
    prompt = make_prompt(torch.arange(5, 12))
    (group,) = TransformersEngine().generate(policy, [prompt], SamplingParams(2, 6), 0).completions
    with torch.no_grad():
        expected, _ = padded_logprobs(policy.base_model, [(prompt.input_ids, [c.token_ids for c in group])])
    assert (torch.cat([c.sampler_logprobs for c in group]) - expected).abs().max() < 1e-5
    with pytest.raises(UserError, match="cannot continue where a turn ends"):
        refuse_padded(policy)


def test_memory_that_runs_out_is_no_reason_to_sample_otherwise(micro_model_dir, monkeypatch):
    def full(*_, **__):
        raise RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")

    monkeypatch.setattr(BlockCache, "attend", full)
    policy = micro_policy(micro_model_dir)
    with pytest.raises(RuntimeError, match="ALLOC_FAILED"):
        choose_decoding(policy)
    assert not policy.samples_padded
