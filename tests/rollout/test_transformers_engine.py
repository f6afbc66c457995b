"""The in-process engine: what it samples, what it reports, what it repeats."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from gspo_lightning.errors import NonFiniteGradientError, UserError
from gspo_lightning.packing import batch, pack
from gspo_lightning.rollout import TransformersEngine, decoder
from gspo_lightning.rollout.decoder import Decoder
from gspo_lightning.types import SamplingParams
from tests.support import make_prompt, micro_policy

SAMPLING = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8)


@pytest.fixture(scope="module")
def policy(micro_model_dir):
    return micro_policy(micro_model_dir)


@pytest.fixture()
def prompts():
    return [make_prompt(torch.arange(5, 5 + n), uid=f"t:{n}") for n in (3, 9, 1, 6)]


def trained_logprobs(policy, rollout, temperature):
    groups = [
        (p.input_ids, [c.token_ids for c in g]) for p, g in zip(rollout.prompts, rollout.completions, strict=True)
    ]
    with torch.no_grad():
        return policy(pack(groups, torch.device("cpu")), temperature)[0]


def test_sampler_logprobs_equal_those_of_the_training_forward(policy, prompts):
    rollout = TransformersEngine().generate(policy, prompts, SAMPLING, seed=1)
    sampler = torch.cat([c.sampler_logprobs for group in rollout.completions for c in group])
    assert (sampler - trained_logprobs(policy, rollout, 0.8)).abs().max() < 1e-5


def test_greedy_equals_generate_of_transformers(policy, prompts):
    greedy = SamplingParams(num_generations=1, max_completion_length=12, temperature=0.0)
    rollout = TransformersEngine().generate(policy, prompts, greedy, seed=0)
    for prompt, (completion,) in zip(prompts, rollout.completions, strict=True):
        ids = policy.base_model.generate(prompt.input_ids[None], max_new_tokens=12, do_sample=False)
        assert completion.token_ids.tolist() == ids[0, len(prompt.input_ids) :].tolist()


def test_completions_do_not_depend_on_the_other_prompts_or_their_order(policy, prompts):
    whole = TransformersEngine().generate(policy, prompts, SAMPLING, seed=7)
    turned = TransformersEngine().generate(policy, prompts[::-1], SAMPLING, seed=7)
    by_turns = TransformersEngine(max_concurrent=4).generate(policy, prompts, SAMPLING, seed=7)
    for group, other, third in zip(whole.completions, turned.completions[::-1], by_turns.completions, strict=True):
        for a, b, c in zip(group, other, third, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            assert torch.equal(a.token_ids, c.token_ids)


@pytest.mark.parametrize(
    ("at_a_time", "once", "every_time"), [(8192, [39], [99]), (60, [32, 27], [52, 47])], ids=["one row", "two rows"]
)
def test_what_prompts_begin_with_is_forwarded_once_and_changes_no_completion(
    policy, at_a_time, once, every_time, monkeypatch
):
    """20 tokens of 3 + 9 + 1 + 6: of two rows, the first has 23 + 29 and the second 21 + 26."""
    system = torch.arange(40, 60)
    prompts = [make_prompt(torch.cat([system, torch.arange(n, 2 * n)]), uid=f"s:{n}") for n in (3, 9, 1, 6)]
    forwarded: list[int] = []
    forward = policy.hidden_states

    def counting(ids, *arguments, **keywords):
        forwarded.append(ids.numel())
        return forward(ids, *arguments, **keywords)

    monkeypatch.setattr(decoder, "PREFILL_TOKENS", at_a_time)
    monkeypatch.setattr(policy, "hidden_states", counting)
    shared = TransformersEngine().generate(policy, prompts, SAMPLING, seed=11)
    assert forwarded[: len(once)] == once
    monkeypatch.setattr(batch, "LEAST_COMMON", 10_000)
    forwarded.clear()
    apart = TransformersEngine().generate(policy, prompts, SAMPLING, seed=11)
    assert forwarded[: len(once)] == every_time
    for group, other in zip(shared.completions, apart.completions, strict=True):
        for a, b in zip(group, other, strict=True):
            assert torch.equal(a.token_ids, b.token_ids)
            assert torch.allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=1e-6, atol=1e-6)


def test_the_same_seed_repeats_and_another_differs(policy, prompts):
    first, again, other = (TransformersEngine().generate(policy, prompts, SAMPLING, seed=s) for s in (3, 3, 4))
    texts = [[c.text for group in r.completions for c in group] for r in (first, again, other)]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]
    for a, b in zip(first.completions[0], again.completions[0], strict=True):
        assert torch.equal(a.sampler_logprobs, b.sampler_logprobs)


@pytest.mark.parametrize("temperature", [0.8, 0.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("is_padded", [False, True])
def test_logits_that_are_not_finite_are_said(is_padded, value, temperature, micro_model_dir, prompts):
    policy = micro_policy(micro_model_dir)
    if is_padded:
        policy.fall_back()
    with torch.no_grad():
        policy.base_model.model.norm.weight.fill_(value)
    sampling = SamplingParams(num_generations=2, max_completion_length=3, temperature=temperature)
    with pytest.raises(NonFiniteGradientError, match="the policy's logits are NaN or infinite"):
        TransformersEngine().generate(policy, prompts, sampling, seed=0)


def test_each_of_several_eos_ids_ends_a_completion_and_belongs_to_it(policy, prompts):
    original = policy.base_model.generation_config.eos_token_id
    policy.base_model.generation_config.eos_token_id = [20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    try:
        assert set(policy.eos_token_ids) == {*range(20, 30), policy.tokenizer.eos_token_id}
        rollout = TransformersEngine().generate(policy, prompts, SAMPLING, seed=5)
        ends = set(policy.eos_token_ids)
    finally:
        policy.base_model.generation_config.eos_token_id = original
    completions = [c for group in rollout.completions for c in group]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    assert len({c.token_ids[-1].item() for c in stopped}) > 1
    for completion in completions:
        assert not ends & set(completion.token_ids[:-1].tolist())
        assert (completion.token_ids[-1].item() in ends) == (completion.finish_reason == "stop")
        assert completion.finish_reason == "stop" or len(completion.token_ids) == 12


def test_a_stop_string_ends_with_the_token_that_completes_it(policy, prompts):
    free = TransformersEngine().generate(policy, prompts, SAMPLING, seed=9).completions
    stop = next(c.text[4:6] for group in free for c in group if len(c.text) >= 8)
    sampling = SamplingParams(num_generations=4, max_completion_length=12, temperature=0.8, stop=(stop,))
    stopped = TransformersEngine().generate(policy, prompts, sampling, seed=9).completions
    hits = 0
    for before, after in zip((c for g in free for c in g), (c for g in stopped for c in g), strict=True):
        if stop in before.text:
            hits += 1
            assert after.text == before.text[: before.text.index(stop) + len(stop)]
            assert after.finish_reason == "stop"
        else:
            assert after.text == before.text
    assert hits


def test_random_numbers_go_to_the_device_once_per_rollout(policy, prompts):
    """Those of every row and token: a copy at each token would wait for the device."""
    elsewhere = SimpleNamespace(device=torch.device("meta"), eos_token_ids=(), tokenizer=policy.tokenizer)
    there, here = (Decoder(p, prompts[:2], SamplingParams(3, 9), 0).uniforms for p in (elsewhere, policy))
    assert there.is_meta and here.device == policy.device and there.shape == here.shape == (6, 9)


def test_a_special_token_can_stop_and_parts_a_string(policy, prompts):
    """As vLLM reads completions: with their special tokens."""
    first, second = (policy.tokenizer.convert_ids_to_tokens(token) for token in (5, 6))
    special = next(t for t in policy.tokenizer.all_special_ids if t not in policy.eos_token_ids)
    name = policy.tokenizer.convert_ids_to_tokens(special)
    decoder = Decoder(policy, prompts[:1], SamplingParams(1, 9, stop=(name, first + second)), 0)
    assert [decoder._has_stop_string(row) for row in ([5, special], [5, 6], [5], [6, 5])] == [True, True, False, False]
    without = Decoder(policy, prompts[:1], SamplingParams(1, 9, stop=(first + second,)), 0)
    assert not without._has_stop_string([5, special, 6])


def test_a_stop_string_is_looked_for_at_the_end_of_a_row_alone(policy, prompts, monkeypatch):
    """A row of n tokens would otherwise be decoded n times over."""
    stop = "".join(policy.tokenizer.convert_ids_to_tokens([5, 6, 7]))
    decoder, decoded = Decoder(policy, prompts[:1], SamplingParams(1, 9, stop=("é", stop)), 0), []
    decode = type(policy.tokenizer).decode
    monkeypatch.setattr(
        type(policy.tokenizer), "decode", lambda self, ids, **kwargs: decoded.append(ids) or decode(self, ids, **kwargs)
    )
    assert decoder._has_stop_string([9] * 500 + [5, 6, 7]) and not decoder._has_stop_string([9] * 500 + [5, 6])
    assert [len(ids) for ids in decoded] == [3 + 8] * 2  # three bytes, and as many tokens as may bring none


def bytes_tokenizer():
    """As Llama 2's and Mistral's: characters that the vocabulary lacks are bytes, as is the line feed."""
    pieces = ["<unk>", "</s>", *(f"<0x{number:02X}>" for number in range(256)), "▁", "a", "b"]
    tokenizer = Tokenizer(models.Unigram([(piece, -1.0) for piece in pieces], unk_id=0, byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>")


@pytest.mark.parametrize("stop", ["\n", "b\n", "鑫é", "\n😀a"])
def test_a_stop_string_is_found_among_bytes_wherever_the_decoded_end_of_the_row_begins(stop):
    tokenizer, generator = bytes_tokenizer(), random.Random(0)
    policy = SimpleNamespace(device=torch.device("cpu"), eos_token_ids=(), tokenizer=tokenizer)
    decoder = Decoder(policy, [make_prompt([5])], SamplingParams(1, 9, stop=(stop,)), 0)
    for _ in range(200):
        text = "".join(generator.choices("鑫é😀ab", k=generator.randrange(30))) + stop
        row = tokenizer(text, add_special_tokens=False)["input_ids"]
        ends = [end for end in range(1, len(row) + 1) if stop in tokenizer.decode(row[:end])]
        found = [end for end in range(1, len(row) + 1) if decoder._has_stop_string(row[:end])]
        assert found[:1] == ends[:1] and found[-1:] == [len(row)], text


@pytest.fixture()
def forwards(monkeypatch, policy):
    """Shapes of all forwards."""
    shapes = []
    original = type(policy).hidden_states

    def spy(self, input_ids, *args, **kwargs):
        shapes.append(tuple(input_ids.shape))
        return original(self, input_ids, *args, **kwargs)

    monkeypatch.setattr(type(policy), "hidden_states", spy)
    return shapes


def test_each_unique_prompt_is_forwarded_once(policy, prompts, forwards):
    TransformersEngine().generate(policy, prompts, SAMPLING, seed=1)
    assert forwards[0] == (1, 3 + 9 + 1 + 6)
    assert forwards[1][0] <= 16 and all(width == 1 for _, width in forwards[1:])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.bfloat16, 0.02)])
def test_many_prompt_tokens_are_forwarded_in_parts(dtype, tolerance, micro_model_dir, prompts, forwards, monkeypatch):
    """In bfloat16 each part is filled up to a usual length on a CPU; its keys are not those of the next prompt."""
    policy = micro_policy(micro_model_dir, dtype)
    whole = TransformersEngine().generate(policy, prompts, SAMPLING, seed=1)
    forwards.clear()
    monkeypatch.setattr("gspo_lightning.rollout.decoder.PREFILL_TOKENS", 7)
    in_parts = TransformersEngine().generate(policy, prompts, SAMPLING, seed=1)
    assert forwards[:3] == [(1, 3), (1, 9), (1, 1 + 6)] and forwards[3][1] == 1
    for a, b in zip(sum(whole.completions, []), sum(in_parts.completions, []), strict=True):
        assert a.token_ids.tolist() == b.token_ids.tolist()
        assert torch.allclose(a.sampler_logprobs, b.sampler_logprobs, rtol=0, atol=tolerance)


def test_tokens_that_were_added_to_the_tokenizer_alone_are_named_with_their_row(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    size = len(policy.output_weight)
    policy.tokenizer.add_tokens([f"<new{n}>" for n in range(size)])
    TransformersEngine().generate(policy, [make_prompt([5, size - 1])], SamplingParams(1, 2), 0)
    with pytest.raises(
        UserError, match=rf"row task:7: the model has embeddings for {size} tokens, .* token {size} \('<new"
    ):
        TransformersEngine().generate(policy, [make_prompt([5, size], uid="task:7")], SamplingParams(1, 2), 0)
