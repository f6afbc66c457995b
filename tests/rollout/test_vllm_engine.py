"""vLLM in process, for real: what it samples, how weights reach it, and what happens without each cure."""

from __future__ import annotations

import functools
import itertools
import time

import pytest
import torch

from gspo_lightning.dialogue import Environments
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.micro import build_micro_model
from gspo_lightning.rollout import TransformersEngine, VLLMEngine, WeightSyncError, vllm_engine, vllm_worker, weights
from gspo_lightning.types import SamplingParams
from tests.dialogue.test_sampling import Says
from tests.support import make_prompt, micro_policy

pytestmark = [pytest.mark.vllm, pytest.mark.filterwarnings("ignore")]

SAMPLING = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The micro model with heads of size 32."""
    path = tmp_path_factory.mktemp("micro32")
    build_micro_model(path, num_attention_heads=2)
    return path


@pytest.fixture(scope="module")
def prompts():
    # Longer than two cache blocks of 32 tokens, so that prefixes are reused.
    return [make_prompt(torch.arange(n, n + 70) % 90 + 3, uid=f"t:{n}") for n in range(3)]


@pytest.fixture()
def policy(folder):
    return micro_policy(folder, torch.float32)


@pytest.fixture()
def start(folder):
    engines = []

    def make(**settings):
        engines.append(VLLMEngine(str(folder), 80, 12, kv_cache_gb=0.05, max_num_seqs=16, **settings))
        return engines[-1]

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def running(folder):
    """One engine for the tests that do not break it."""
    engine = VLLMEngine(str(folder), 80, 12, kv_cache_gb=0.05, max_num_seqs=16)
    yield engine
    engine.close()


def move(policy, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))


def largest_difference(policy, rollout, temperature=0.8):
    groups = [
        (p.input_ids, [c.token_ids for c in g]) for p, g in zip(rollout.prompts, rollout.completions, strict=True)
    ]
    with torch.no_grad():
        own = policy(pack(groups, policy.device), temperature)[0]
    theirs = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    return (own - theirs).abs().max().item()


def test_logprobs_are_those_of_the_policy_after_every_change_of_its_weights(policy, prompts, running):
    for seed in range(4):
        rollout = running.generate(policy, prompts, SAMPLING, seed=0)
        assert largest_difference(policy, rollout) < 1e-4
        move(policy, seed)


def test_weights_travel_only_when_they_changed(policy, prompts, running):
    running.generate(policy, prompts, SAMPLING, seed=0)
    before = running.syncs
    running.generate(policy, prompts, SAMPLING, seed=1)
    assert running.syncs == before
    with torch.no_grad():
        policy.base_model.model.norm.weight[0] += 1e-6
    running.generate(policy, prompts, SAMPLING, seed=1)
    assert running.syncs == before + 1


def test_greedy_completions_equal_those_of_the_transformers_engine(policy, prompts, running):
    greedy = SamplingParams(num_generations=1, max_completion_length=12, temperature=0.0)
    ours, theirs = (engine.generate(policy, prompts, greedy, 0) for engine in (TransformersEngine(), running))
    for (a,), (b,) in zip(ours.completions, theirs.completions, strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert (a.text, a.finish_reason) == (b.text, b.finish_reason)
        assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() < 1e-4


def test_the_seed_decides_and_generations_differ(policy, prompts, running):
    first, again, other = (running.generate(policy, prompts, SAMPLING, seed) for seed in (1, 1, 2))
    ids = [[c.token_ids.tolist() for g in r.completions for c in g] for r in (first, again, other)]
    assert ids[0] == ids[1] != ids[2]
    assert len(set(map(tuple, ids[0][:4]))) > 1


def test_draws_follow_the_policys_distribution_also_between_generations(policy, prompts, running):
    """Chi-square of 1,920 first tokens; consecutive seeds of a group must not be correlated either."""
    draws = []
    for seed in range(30):
        (group,) = running.generate(policy, prompts[:1], SamplingParams(64, 1, temperature=1.0), seed).completions
        draws.append([one.token_ids[0].item() for one in group])
    every_token = [torch.tensor([token]) for token in range(policy.output_weight.shape[0])]
    with torch.no_grad():
        expected = 1920 * policy(pack([(prompts[0].input_ids, every_token)], policy.device))[0].double().exp()
    counts = torch.bincount(torch.tensor(draws).flatten(), minlength=len(expected))
    freedom = len(expected) - 1
    assert ((counts - expected).square() / expected).sum() < freedom + 5 * (2 * freedom) ** 0.5
    equal = sum(a == b for group in draws for a, b in zip(group, group[1:], strict=False))
    chance = (expected / 1920).square().sum().item() * 30 * 63
    assert abs(equal - chance) < 5 * chance**0.5


def test_eos_and_stop_strings_end_completions_and_belong_to_them(policy, prompts, running):
    free = running.generate(policy, prompts, SAMPLING, seed=9).completions
    stop = next(c.text[3:5] for group in free for c in group if len(c.text) >= 8)
    sampling = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8, stop=(stop,))
    stopped = running.generate(policy, prompts, sampling, seed=9).completions
    for before, after in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        if stop in before.text:
            assert after.text == before.text[: before.text.index(stop) + len(stop)]
            assert after.finish_reason == "stop"
    move(policy)
    policy.base_model.generation_config.eos_token_id = list(range(20, 60))
    for group in running.generate(policy, prompts, SAMPLING, seed=5).completions:
        for one in group:
            inside = [token in range(20, 60) for token in one.token_ids.tolist()]
            assert not any(inside[:-1])
            assert inside[-1] == (one.finish_reason == "stop") or one.token_ids[-1] == policy.tokenizer.eos_token_id


def test_trap_1_without_packing_again_the_tied_output_embedding_stays_old(policy, prompts, start, monkeypatch):
    monkeypatch.setattr(vllm_worker, "repack_cpu_linears", lambda model: None)
    with pytest.raises(WeightSyncError):
        start().generate(policy, prompts, SAMPLING, seed=0)


def test_trap_2_without_a_reset_the_prefix_cache_serves_old_keys(policy, prompts, start, monkeypatch):
    engine = start()
    engine.generate(policy, prompts, SAMPLING, seed=0)
    monkeypatch.setattr(engine, "_reset_caches", lambda: None)
    move(policy)
    with pytest.raises(WeightSyncError):
        engine.generate(policy, prompts, SAMPLING, seed=0)


def test_trap_4_without_processed_logprobs_the_temperature_is_ignored(policy, prompts, start, monkeypatch):
    import vllm

    monkeypatch.setattr(vllm, "LLM", functools.partial(_raw_llm, vllm.LLM))
    with pytest.raises(WeightSyncError):
        start().generate(policy, prompts, SAMPLING, seed=0)


def _raw_llm(original, model, **settings):
    return original(model, **{**settings, "logprobs_mode": "raw_logprobs"})


def test_the_precision_of_the_trainer_does_not_act_on_vllm(policy, prompts, start, monkeypatch):
    """On a GPU the angles of its rotations would be in bfloat16 (`tests/fake_gpu`), and products that name no dtype."""
    import vllm
    from vllm.v1.engine.llm_engine import LLMEngine

    seen = []

    def noting(function):
        def call(*arguments, **named):
            seen.append((function.__name__, torch.is_autocast_enabled("cpu"), torch.get_default_dtype()))
            return function(*arguments, **named)

        return call

    monkeypatch.setattr(vllm.LLM, "__init__", noting(vllm.LLM.__init__))
    monkeypatch.setattr(vllm.LLM, "enqueue", noting(vllm.LLM.enqueue))
    monkeypatch.setattr(LLMEngine, "step", noting(LLMEngine.step))
    monkeypatch.setattr(vllm_worker, "repack_cpu_linears", noting(vllm_worker.repack_cpu_linears))
    engine = start(tolerance=1.0)
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.autocast("cpu", torch.bfloat16):
            engine.generate(policy, prompts, SAMPLING, seed=0)
            assert torch.is_autocast_enabled("cpu") and torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    names = ("__init__", "enqueue", "step", "repack_cpu_linears")
    assert set(seen) == {(name, False, torch.float32) for name in names}
    assert torch.backends.mkldnn.matmul.fp32_precision == "none"  # vLLM has set it for the whole process


@pytest.mark.parametrize(
    "tensor", ["model.layers.0.self_attn.k_proj.weight", "model.norm.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("how", ["left out", "changed"])
def test_a_corrupted_synchronisation_stops_the_run(tensor, how, policy, prompts, start, monkeypatch):
    def corrupted(policy, dtype):
        for name, value in weights.named_weights(policy, dtype):
            if name != tensor or how == "changed":
                yield name, value * (1.2 if name == tensor else 1.0)

    monkeypatch.setattr(vllm_engine, "named_weights", corrupted)
    with pytest.raises((WeightSyncError, ValueError), match="does not run the policy's weights|not initialized"):
        start().generate(policy, prompts, SAMPLING, seed=0)


@pytest.mark.parametrize("how", ["adapter", "merged"])
def test_lora_is_sampled_on_policy_and_the_base_stays_as_it_is(how, folder, prompts, start):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=4, alpha=8)).load()
    base = {n: p.clone() for n, p in policy.base_model.named_parameters() if not p.requires_grad}
    engine = start(lora_sync=how)
    for seed in range(3):
        assert largest_difference(policy, engine.generate(policy, prompts, SAMPLING, seed)) < 1e-4
        move(policy, seed)
    after = dict(policy.base_model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in base.items())


def test_an_engine_that_ignores_the_adapter_is_found_at_the_start(folder, prompts, start, monkeypatch):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=4, alpha=8)).load()
    before = [p.clone() for p in weights.trained_parameters(policy)]
    engine = start()
    monkeypatch.setattr(engine, "_send_adapter", lambda policy: None)
    for _ in range(2):  # the engine has started then; an adapter at its first value is no proof
        with pytest.raises(WeightSyncError):
            engine.generate(policy, prompts, SAMPLING, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(weights.trained_parameters(policy), before, strict=True))


def test_base_weights_are_bit_identical_after_a_thousand_adapters(folder, prompts, start):
    policy = PolicyLoader(str(folder), lora=LoraSettings(r=4, alpha=8)).load()
    engine = start()
    engine.generate(policy, prompts, SAMPLING, seed=0)
    frozen = lambda: weights.checksum(p for p in policy.parameters() if not p.requires_grad)  # noqa: E731
    held = lambda: engine._llm.collective_rpc("gspo_base_checksum")[0]["checksum"]  # noqa: E731
    ours, theirs = frozen(), held()
    one = SamplingParams(num_generations=1, max_completion_length=1)
    for number in range(1000):
        with torch.no_grad():
            next(weights.trained_parameters(policy)).add_(1e-3 * (-1) ** number)
        engine._send(policy)
        engine._sample(policy, [(prompts[0], one, number)])
    assert (frozen(), held()) == (ours, theirs)
    assert largest_difference(policy, engine.generate(policy, prompts, SAMPLING, 0)) < 1e-4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"sleep": True}, "rollout.engine.sleep=true has no effect"),
        ({"memory_fraction": 0.5}, "rollout.engine.memory_fraction=0.5 has no effect"),
    ],
)
@pytest.mark.skipif(torch.cuda.is_available(), reason="these act on a GPU")
def test_settings_of_a_gpu_are_refused_on_a_cpu(settings, message):
    with pytest.raises(UserError, match=message):
        VLLMEngine("anything", 8, 8, **settings)


@pytest.mark.parametrize(
    ("sizes", "memory", "line"),
    [
        ((80, 12), 1e-5, "No available memory for the cache blocks; check rollout.engine .*=92, or use rollout=transf"),
        ((80, 5000), 0.05, r"max_model_len \(5080\) is greater than .*; check .*max_completion_length=5080, or use "),
    ],
)
def test_settings_that_vllm_refuses_are_one_line(sizes, memory, line, folder, policy, prompts):
    with pytest.raises(UserError, match=f"^vLLM does not start: .*{line}") as error:
        VLLMEngine(str(folder), *sizes, kv_cache_gb=memory).generate(policy, prompts, SAMPLING, seed=0)
    assert "\n" not in str(error.value)


def test_more_prompts_than_a_batch_of_the_engine_holds_are_answered(policy, folder):
    # Last in the file: closing an engine takes the process group of the one that other tests share with it.
    # 240 x 70 tokens: vLLM 0.32 would cut a prompt into chunks, which a seeded request does not survive on a CPU.
    prompts = [make_prompt(torch.arange(n, n + 70) * 7 % 90 + 3, uid=f"t:{n}") for n in range(240)]
    engine = VLLMEngine(str(folder), 80, 12, kv_cache_gb=0.5, max_num_seqs=240)
    try:
        rollout = engine.generate(policy, prompts, SAMPLING, seed=0)
    finally:
        engine.close()
    assert largest_difference(policy, rollout) < 1e-4


class Fails(Says):
    def step(self, text):
        raise ValueError("no answer")


class WaitsForTheEngine(Says):
    """The first answer of all comes when the engine has taken two more steps, which it does only for other dialogues."""

    def __init__(self, steps, begun):
        super().__init__()
        self.steps, self.begun = steps, begun

    def step(self, text):
        self.begun.append(text)
        goal, end = len(self.steps) + 2 * (len(self.begun) == 1), time.monotonic() + 60
        while len(self.steps) < goal:
            assert time.monotonic() < end, "the engine waits for the environment"
            time.sleep(0.001)
        return super().step(text)


def lengths_of_turns(completion):
    """Tokens of each of the policy's turns."""
    dialogue = completion.dialogue
    begins = [*dialogue.begins.nonzero().flatten().tolist(), len(completion.token_ids)]
    return [int(dialogue.trained[start:end].sum()) for start, end in itertools.pairwise(begins)]


def test_greedy_dialogues_equal_those_of_the_transformers_engine(policy, folder, monkeypatch):
    """Turn by turn here, token by token there; a turn ends with a vowel or one of n, r, s, t."""
    asked = [make_prompt(torch.arange(n, n + 9) * 7 % 90 + 3, uid=f"u:{n}") for n in range(8)]
    greedy = SamplingParams(num_generations=2, max_completion_length=40, temperature=0.0, stop=tuple("aeiounrst"))
    environments = Environments(Says, 4)
    engine = VLLMEngine(str(folder), 40, 40, kv_cache_gb=0.05, max_num_seqs=16, environments=environments)
    try:
        engine.generate(policy, asked, greedy, 3)  # the first call proves the weights too
        steps, step = [], engine._llm.llm_engine.step
        monkeypatch.setattr(engine._llm.llm_engine, "step", lambda: (steps.append(1), step())[1])
        theirs = engine.generate(policy, asked, greedy, 3).completions
        taken = len(steps)
        engine.environments = Environments(functools.partial(WaitsForTheEngine, steps, []), 4, workers=2)
        waited = engine.generate(policy, asked, greedy, 3).completions
        engine.environments = Environments(Fails, 4)
        with pytest.raises(UserError, match="no answer"):
            engine.generate(policy, asked, greedy, 3)
        assert not engine._llm.llm_engine.has_unfinished_requests()  # they would keep new weights from being loaded
    finally:
        engine.close()
    # No dialogue waits for another: the engine takes as many steps as the longest has tokens, and one more per turn.
    in_rounds = sum(map(max, itertools.zip_longest(*map(lengths_of_turns, sum(theirs, [])), fillvalue=0)))
    alone = max(sum(lengths) + len(lengths) for lengths in map(lengths_of_turns, sum(theirs, [])))
    assert taken <= alone < in_rounds
    assert [c.token_ids.tolist() for c in sum(waited, [])] == [c.token_ids.tolist() for c in sum(theirs, [])]
    ours = TransformersEngine(environments=environments).generate(policy, asked, greedy, 3).completions
    assert max(c.dialogue.num_turns for group in ours for c in group) > 1
    for a, b in zip(sum(ours, []), sum(theirs, []), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist() and a.text == b.text
        assert (a.dialogue.trained == b.dialogue.trained).all() and a.finish_reason == b.finish_reason
        assert (a.sampler_logprobs - b.sampler_logprobs).abs().max() < 1e-4
