"""A micro-batch that does not fit is cut in two: the same gradient, the same metrics, nothing counted twice."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.errors import UserError
from gspo_lightning.out_of_memory import cut, halved
from gspo_lightning.packing import GroupSlice
from gspo_lightning.policy.model import Policy
from gspo_lightning.update import Minibatch
from tests.support import relative_distance
from tests.training import Batches, Settings, build_module, scripted_prompts, trainer, weights

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
}


def fit(module, prompts):
    trainer().fit(module, Batches(prompts).loader())
    return module


class Limit:
    """Forwards, or the backward of forwards, of more than so many tokens fail."""

    def __init__(self, monkeypatch, tokens, where, error):
        self.failed = 0
        forward = Policy.forward

        def limited(policy, packed, *arguments, **settings):
            too_many = packed.num_tokens > tokens and torch.is_grad_enabled() == (where != "old")
            if too_many and where in ("forward", "old"):
                self.fail(error)
            logprobs, entropy = forward(policy, packed, *arguments, **settings)
            if too_many and where == "backward" and logprobs.requires_grad:
                logprobs.register_hook(lambda gradient: self.fail(error))
            return logprobs, entropy

        monkeypatch.setattr(Policy, "forward", limited)

    def fail(self, error):
        self.failed += 1
        raise error


KINDS = {
    "gspo": {"importance_sampling_level": "sequence", "loss_type": "grpo"},
    "kl": {"importance_sampling_level": "token", "loss_type": "dapo", "beta": 0.1},
    "entropy tokens": {"importance_sampling_level": "token", "loss_type": "grpo", "top_entropy_quantile": 0.5},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["forward", "backward", "old"])
def test_the_update_is_that_of_enough_memory(where, error, kind, micro_model_dir, monkeypatch, capsys):
    # Two passes over two minibatches, so that old log-probabilities must follow the cut.
    settings = Settings(objective=KINDS[kind], update={"num_minibatches": 2, "num_iterations": 2})
    prompts = scripted_prompts(count=8)
    enough = fit(build_module(micro_model_dir, settings), prompts)
    limit = Limit(monkeypatch, 24, where, ERRORS[error])
    short = fit(build_module(micro_model_dir, settings), prompts)
    assert limit.failed > 0
    assert relative_distance(weights(short), weights(enough)) < 1e-12
    differ = ("time/", "perf/", "count/oom_splits", "count/train_tokens")
    for name, value in enough.last_metrics.items():
        if not name.startswith(differ):
            assert short.last_metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    if where != "old":
        assert short.counts["oom_splits"] == limit.failed
        assert capsys.readouterr().err.count("cut in two, the gradient stays the same") == limit.failed


def test_one_sequence_that_does_not_fit_is_named_with_the_keys_to_lower(micro_model_dir, monkeypatch):
    Limit(monkeypatch, 5, "forward", ERRORS["cuda"])
    with pytest.raises(
        UserError, match=r"one sequence of \d+ tokens \(row scripted:\d\) .*rollout.max_completion_length"
    ):
        fit(build_module(micro_model_dir, Settings()), scripted_prompts())


def test_one_of_several_ranks_cannot_cut_alone(micro_model_dir, monkeypatch):
    """The others would wait for a forward that does not come."""
    Limit(monkeypatch, 24, "forward", ERRORS["cuda"])
    monkeypatch.setattr("gspo_lightning.out_of_memory.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"of \d+ tokens on one of the ranks; lower update.max_tokens_per_microbatch"):
        fit(build_module(micro_model_dir, Settings()), scripted_prompts(count=8))


def test_other_errors_are_not_taken_for_it(micro_model_dir, monkeypatch):
    Limit(monkeypatch, 5, "forward", RuntimeError("shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit(build_module(micro_model_dir, Settings()), scripted_prompts())


def test_what_belongs_to_tokens_is_cut_where_the_sequences_are(micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    fit(module, scripted_prompts())
    scored = module.last_scored
    plan = (GroupSlice(0, (0, 1, 2)), GroupSlice(2, (1,)))
    lengths = [[len(c.token_ids) for c in group] for group in scored.completions]
    size = sum(lengths[0]) + lengths[2][1]
    row = torch.arange(float(size))
    minibatch = Minibatch((0, 2), (plan,), 4, size)
    finer, (old, none) = cut(minibatch, [[row], None], 0, scored)
    assert finer.plan == ((GroupSlice(0, (0, 1, 2)),), (GroupSlice(2, (1,)),)) and none is None
    assert [len(x) for x in old] == [sum(lengths[0]), lengths[2][1]] and torch.equal(torch.cat(old), row)
    assert halved((GroupSlice(0, (0, 1, 2)),), scored) == ((GroupSlice(0, (0,)),), (GroupSlice(0, (1, 2)),))
