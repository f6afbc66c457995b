"""A micro-batch that does not fit is cut in two: the same gradient, the same metrics, nothing counted twice.

Where that cannot be done, and where nothing can be cut, the run ends in one line.
"""

from __future__ import annotations

import functools
import os
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

from gspo_lightning.distributed import first_error
from gspo_lightning.distributed.sharding import FSDP2Strategy
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.packing import GroupSlice
from gspo_lightning.policy.model import Policy
from gspo_lightning.program.training_run import TrainingRun
from gspo_lightning.rollout import RolloutError
from gspo_lightning.training.out_of_memory import OutOfMemoryError, cut, halved, memory_for, tokens_of
from gspo_lightning.training.passes import Passes
from gspo_lightning.training.update import Minibatch, build_micro_batch
from gspo_lightning.types import Completion, SamplingParams, ScoredRollout
from tests.scripted import Batches, ScriptedEngine, Settings, build_module, scripted_prompts, trainer, weights
from tests.support import make_prompt, relative_distance

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory"),
    "cublas": RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "cpu": RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"),
}


def test_what_vllm_says_when_it_wakes_up_without_room_is_a_lack_of_memory():
    """Its allocator (csrc/cumem_allocator.cpp) asks the driver, and torch's error has another spelling."""
    line = "^out of memory while sampling; lower rollout.engine.memory_fraction$"
    with (
        pytest.raises(OutOfMemoryError, match=line),
        memory_for("while sampling", "lower rollout.engine.memory_fraction"),
    ):
        raise RuntimeError("CUDA Error: out of memory at /workspace/csrc/cumem_allocator.cpp:119")


@pytest.mark.parametrize("line", ["Cuda failure 2 'out of memory'", "Failed to CUDA calloc async 608 bytes"])
def test_memory_that_nccl_could_not_get_is_no_lost_rank(line):
    error = RuntimeError(f"NCCL error, unhandled cuda error, NCCL version 2.27.5\nLast error:\n{line}")
    assert not first_error.lost_a_rank(error)
    assert first_error.lost_a_rank(RuntimeError("NCCL error, remote process exited or there was a network error"))
    line = "^out of memory in the optimizer step; wait$"
    with pytest.raises(OutOfMemoryError, match=line), memory_for("in the optimizer step", "wait"):
        raise error


def fit(module, prompts, **changes):
    trainer(**changes).fit(module, Batches(prompts).loader())
    return module


CHECKED = 31
"""Tokens of the row by which packing is checked at the start, which must fit."""


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
    "covariant tokens": {
        "importance_sampling_level": "token", "loss_type": "clip_cov", "clip_cov_ratio": 0.2, "clip_cov_lb": 0.0
    },
}  # fmt: skip


# Every kind with every place, and every error with both; how an error is known does not depend on the kind.
CASES = [
    (where, list(ERRORS)[(i + j) % len(ERRORS)], kind)
    for i, where in enumerate(["forward", "backward", "old"])
    for j, kind in enumerate(KINDS)
]


@pytest.mark.parametrize(("where", "error", "kind"), CASES)
def test_the_update_is_that_of_enough_memory(where, error, kind, micro_model_dir, monkeypatch, capsys):
    # Two passes over two minibatches, so that old log-probabilities must follow the cut.
    settings = Settings(objective=KINDS[kind], update={"num_minibatches": 2, "num_iterations": 2})
    prompts = scripted_prompts(count=8)
    enough = fit(build_module(micro_model_dir, settings), prompts)
    limit = Limit(monkeypatch, CHECKED, where, ERRORS[error])
    short = fit(build_module(micro_model_dir, settings), prompts)
    assert limit.failed > 0
    assert relative_distance(weights(short), weights(enough)) < 1e-12
    differ = ("time/", "perf/", "count/oom_splits", "count/train_tokens")
    for name, value in enough.last_metrics.items():
        if not name.startswith(differ):
            assert short.last_metrics[name] == pytest.approx(value, rel=1e-9, abs=1e-12), name
    if where != "old":
        assert short.counts["oom_splits"] == limit.failed
        assert capsys.readouterr().err.count("split in two, the gradient stays the same") == limit.failed


class WithNorm(GSPOModule):
    """With a term of its own, for which a minibatch without signal is forwarded too."""

    def auxiliary_loss(self, minibatch):
        return 1e-3 * sum(p.square().sum() for p in self.policy.parameters())


def test_a_minibatch_in_which_nothing_is_trained_has_nothing_to_cut(micro_model_dir, monkeypatch):
    Limit(monkeypatch, 0, "forward", ERRORS["cuda"])
    module = build_module(micro_model_dir, Settings())
    module.__class__ = WithNorm
    silent = scripted_prompts()
    for row in silent:
        row.sample["scripted"] = [(number, 0.25) for number, _ in row.sample["scripted"]]
    with pytest.raises(OutOfMemoryError) as refused:
        fit(module, silent)
    assert str(refused.value) == (
        "out of memory: one sequence and auxiliary_loss, where a rank has nothing else to train in a minibatch, does "
        "not fit; lower data.max_prompt_length or rollout.max_completion_length, or set model.gradient_checkpointing=true"
    )


def test_one_sequence_that_does_not_fit_is_named_with_the_keys_to_lower(micro_model_dir, monkeypatch):
    Limit(monkeypatch, 5, "forward", ERRORS["cuda"])
    with pytest.raises(
        UserError, match=r"one sequence of \d+ tokens \(row scripted:\d\) .*rollout.max_completion_length"
    ):
        fit(build_module(micro_model_dir, Settings()), scripted_prompts())


def test_one_of_several_ranks_cannot_cut_alone(micro_model_dir, monkeypatch):
    """The others would wait for a forward that does not come."""
    Limit(monkeypatch, CHECKED, "forward", ERRORS["cuda"])
    monkeypatch.setattr("gspo_lightning.training.out_of_memory.world_size", lambda: 2)
    with pytest.raises(UserError, match=r"of \d+ tokens on one of the ranks; lower update.max_tokens_per_microbatch"):
        fit(build_module(micro_model_dir, Settings()), scripted_prompts(count=8))


@pytest.fixture
def _one_process_of_several():
    """Gives back what a strategy of several processes leaves in the one that it ran in."""
    before = dict(os.environ)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("_one_process_of_several")
@pytest.mark.parametrize("strategy", [DDPStrategy, FSDP2Strategy])
def test_a_strategy_of_several_processes_takes_no_gradient_again(strategy, micro_model_dir, monkeypatch):
    """Of a backward that broke off DDP keeps marks, and FSDP2 gathered weights, which the optimizer does not know."""
    Limit(monkeypatch, CHECKED, "backward", ERRORS["cuda"])
    module = build_module(micro_model_dir, Settings())
    with pytest.raises(
        OutOfMemoryError,
        match=r"^out of memory in a micro-batch of \d+ tokens; lower update.max_tokens_per_microbatch$",
    ):
        fit(module, scripted_prompts(count=8), strategy=strategy())
    assert module.counts["oom_splits"] == module.counts["optimizer_steps"] == 0


@pytest.mark.usefixtures("_one_process_of_several")
def test_gathered_weights_are_not_taken_again_without_gradient_either(micro_model_dir, monkeypatch):
    settings = Settings(update={"num_minibatches": 2})  # the second has old log-probabilities
    Limit(monkeypatch, CHECKED, "old", ERRORS["cuda"])
    with pytest.raises(OutOfMemoryError, match=r"of \d+ tokens; lower update.max_tokens_per_microbatch$"):
        fit(build_module(micro_model_dir, settings), scripted_prompts(count=8), strategy=FSDP2Strategy())


@pytest.mark.parametrize("replaced", ["all", "one"])
def test_parameters_that_the_optimizer_has_lost_end_the_run(replaced, micro_model_dir, monkeypatch):
    loss = Passes.loss

    def replacing(self, *arguments):
        result = loss(self, *arguments)
        for layer in list(self.policy.modules()):
            for name, parameter in list(layer.named_parameters(recurse=False)):
                if replaced == "all" or parameter is self.policy.output_weight:
                    setattr(layer, name, nn.Parameter(parameter.detach().clone()))
        return result

    module = build_module(micro_model_dir, Settings())
    module.configure_model()
    count = len(list(module.parameters()))
    monkeypatch.setattr(Passes, "loss", replacing)
    left = {"all": 0, "one": count - 1}[replaced]
    with pytest.raises(UserError) as caught:
        fit(module, scripted_prompts())
    assert str(caught.value) == (
        f"optimizer: of the {count} parameters that it trained, {left} are still in the module, and the rest would not "
        "change; do not replace parameters after configure_optimizers, and let a failed backward end the run"
    )
    assert module.counts["optimizer_steps"] == 0


class Full:
    """An engine that samples nothing: greedily, drawn, or not at all."""

    def __init__(self, error, max_concurrent=None, greedy=True, drawn=True):
        self.error, self.fails = error, {True: greedy, False: drawn}
        if max_concurrent is not None:
            self.max_concurrent = max_concurrent

    def generate(self, policy, prompts, sampling, seed):
        if self.fails[sampling.temperature == 0.0]:
            raise self.error
        return ScriptedEngine().generate(policy, prompts, sampling, seed)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(
    ("at_once", "key"),
    [
        (256, "rollout.engine.max_concurrent"),
        (3, "rollout.num_generations"),  # the completions of one prompt are decoded together in any case
        (None, "rollout.engine.memory_fraction (of rollout=vllm)"),
    ],
)
def test_a_rollout_that_does_not_fit_is_one_line_with_the_keys_to_lower(at_once, key, error, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.engine = Full(ERRORS[error], at_once)
    with pytest.raises(OutOfMemoryError) as caught:
        fit(module, scripted_prompts())
    assert str(caught.value) == (
        f"out of memory while sampling 12 completions of up to 8 tokens; lower {key} or rollout.max_completion_length"
    )


@pytest.mark.parametrize(
    ("engine", "count", "key"),
    [
        (Full(ERRORS["cuda"], 256), 4, "rollout.engine.max_concurrent"),
        (Full(ERRORS["cuda"], 256, greedy=False), 8, "rollout.engine.max_concurrent"),
        (Full(ERRORS["cuda"], 2, greedy=False), 8, "validation.num_generations"),
    ],
    ids=["greedy", "drawn", "drawn one prompt at a time"],
)
def test_a_validation_that_does_not_fit_is_one_line_with_the_keys_to_lower(engine, count, key, micro_model_dir):
    module = build_module(micro_model_dir, Settings(), generations=2)
    module.validator.sampled = SamplingParams(2, 8)
    prompts = scripted_prompts(generations=1)
    with pytest.raises(OutOfMemoryError) as caught:
        module.validator.update(module.policy, engine, prompts)
    assert str(caught.value) == (
        f"out of memory while sampling {count} completions of up to 8 tokens for validation; lower {key} or "
        "rollout.max_completion_length"
    )


@pytest.mark.parametrize("error", ERRORS)
def test_an_optimizer_step_that_does_not_fit_is_one_line_with_what_takes_less(error, micro_model_dir, monkeypatch):
    class Large(torch.optim.SGD):
        def step(self, closure=None):
            raise ERRORS[error]

    module = build_module(micro_model_dir, Settings(optimizer=functools.partial(Large, lr=1.0)))
    with pytest.raises(OutOfMemoryError) as caught:
        fit(module, scripted_prompts())
    assert str(caught.value) == (
        "out of memory in the optimizer step; optimizer=adamw_8bit keeps a quarter of the state, lora=language only that "
        "of an adapter"
    )


@pytest.mark.parametrize(
    "error", [RolloutError(f"server 1: {ERRORS['cublas']}"), RuntimeError("no such head")], ids=str
)
def test_errors_of_an_engine_elsewhere_and_others_stay_what_they_are(error):
    """A run that loses its engine saves its rollout first."""
    with pytest.raises(type(error)) as caught, memory_for("here", "lower it"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("saved", [False, True])
def test_the_line_says_what_the_run_can_go_on_from(saved, tmp_path, monkeypatch):
    def train(self):
        with memory_for("here", "lower it"):
            raise ERRORS["cuda"]

    last = tmp_path / "last.ckpt"
    if saved:
        last.touch()
    run = object.__new__(TrainingRun)
    vars(run).update(trainer=SimpleNamespace(is_global_zero=False), checkpoint=SimpleNamespace(last=last), lock=None)
    monkeypatch.setattr(TrainingRun, "_execute", train)
    with pytest.raises(OutOfMemoryError) as caught:
        run.execute()
    stands = f"resume with ckpt_path={last}" if saved else "no checkpoint has been written yet"
    assert str(caught.value) == f"out of memory here; lower it; {stands}"


def test_a_model_with_all_that_belongs_to_it_that_does_not_fit_is_one_line(tmp_path, monkeypatch):
    """As where DDP makes its buffers for gradients, or moments of a checkpoint go to the GPU."""
    run = object.__new__(TrainingRun)
    vars(run).update(
        trainer=SimpleNamespace(is_global_zero=False),
        checkpoint=SimpleNamespace(last=tmp_path / "last.ckpt"),
        lock=None,
        run_dir=tmp_path,
    )
    monkeypatch.setattr(TrainingRun, "_execute", lambda self: (_ for _ in ()).throw(ERRORS["cuda"]))
    with pytest.raises(OutOfMemoryError) as caught:
        run.execute()
    assert str(caught.value) == (
        "out of memory outside of rollouts and updates: weights, gradients and optimizer states do not fit; "
        "lora=language trains an adapter, optimizer=adamw_8bit keeps a quarter of the state, trainer=fsdp splits all "
        "of it over GPUs; no checkpoint has been written yet"
    )
    lost = RolloutError("CUDA error: out of memory on a server")  # the run is saved on it
    monkeypatch.setattr(TrainingRun, "_execute", lambda self: (_ for _ in ()).throw(lost))
    with pytest.raises(RolloutError, match="on a server"):
        run.execute()


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
    finer, (old, none) = cut(minibatch, [[row], None], 0, scored, 16)
    assert finer.plan == ((GroupSlice(0, (0, 1, 2)),), (GroupSlice(2, (1,)),)) and none is None
    assert [len(x) for x in old] == [sum(lengths[0]), lengths[2][1]] and torch.equal(torch.cat(old), row)
    assert halved((GroupSlice(0, (0, 1, 2)),), scored) == ((GroupSlice(0, (0,)),), (GroupSlice(0, (1, 2)),))


def test_the_tokens_that_are_named_are_those_that_were_forwarded():
    """Two prompts of 20 + 3 tokens: as many as the row has, which is what the setting to lower counts."""
    prompts = [make_prompt(torch.cat([torch.arange(20), torch.arange(40 + n, 43 + n)])) for n in range(2)]
    completion = Completion(torch.arange(5), "", torch.zeros(5), "stop")
    rewards = torch.zeros(2, 1, dtype=torch.float64)
    scored = ScoredRollout(prompts, [[completion]] * 2, (), rewards[..., None], rewards, rewards)
    plan, cpu = (GroupSlice(0, (0,)), GroupSlice(1, (0,))), torch.device("cpu")
    for least, tokens in ((20, 20 + 2 * (3 + 4)), (21, 2 * (23 + 4))):
        assert tokens_of(plan, scored, least) == tokens
        assert build_micro_batch(scored, plan, cpu, least).packed.num_tokens == tokens
