"""Architectures that packing does not know run padded, exactly, and say so."""

from __future__ import annotations

import json
import sys

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    Gemma2Config,
    Gemma2ForCausalLM,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.dialogue import Environments
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy.check import choose_forward
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.types import Prompt, SamplingParams
from tests.command_line import run
from tests.support import flat_gradient, make_prompt, micro_policy, random_groups, relative_distance

IMAGE, IMAGE_ID = "<gh_stars>", 7
TEMPLATE = (
    "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<gh_stars>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endif %}\n{% endfor %}"
)


@pytest.fixture(scope="module")
def llava_dir(tmp_path_factory, smollm2_dir):
    """A random LLaVA: another tower, another projector, another way to place features than the families we pack."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    folder = tmp_path_factory.mktemp("llava")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config={"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "patch_size": 14,
                       "num_hidden_layers": 3, "num_attention_heads": 2, "image_size": 28},
        text_config={"model_type": "llama", "vocab_size": len(tokenizer), "hidden_size": 48, "intermediate_size": 64,
                     "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 2},
        image_token_index=IMAGE_ID, image_token_id=IMAGE_ID, vision_feature_layer=-2, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1, chat_template=TEMPLATE,
    ).save_pretrained(folder)  # fmt: skip
    return folder


@pytest.fixture(scope="module")
def llava(llava_dir):
    with pytest.warns(UserWarning, match="llava reads images in a way that packing does not know; falling back to"):
        return PolicyLoader(str(llava_dir), dtype="float64").load()


def encoded(policy, uid, *parts):
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
    message = [{"role": "user", "content": content}]
    ids, inputs = encode_conversation(message, policy.processor, VisionSettings(), {}, f"row {uid}")
    double = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return Prompt(uid, message, ids, {}, double)


def prompts_of(policy):
    red, tall = Image.new("RGB", (30, 30), (255, 0, 0)), Image.linear_gradient("L").resize((40, 90)).convert("RGB")
    return [
        encoded(policy, "one", "what?", red),
        Prompt("text", "", policy.tokenizer("only text", return_tensors="pt")["input_ids"][0], {}),
        encoded(policy, "two", red, "and", tall, "?"),
    ]


def one_by_one(model, groups):
    """No padding, no batch: every sequence alone. Behind an image no placeholder can follow."""
    rows = []
    for prompt, completions in groups:
        for completion in completions:
            ids = torch.cat([prompt.input_ids, completion])[None]
            logits = model(input_ids=ids, **{k: v for k, v in prompt.mm_inputs.items() if "type_ids" not in k}).logits
            if prompt.mm_inputs:
                logits = logits.index_fill(-1, torch.tensor([IMAGE_ID]), -torch.inf)
            log_p = torch.log_softmax(logits[0, len(prompt.input_ids) - 1 : -1] / 0.7, dim=-1)
            rows.append(log_p.gather(1, completion[:, None]).squeeze(1))
    return torch.cat(rows)


def test_log_probabilities_and_gradients_are_those_of_every_sequence_alone(llava):
    generator = torch.Generator().manual_seed(1)
    groups = [
        (prompt, [torch.randint(20, 900, (n,), generator=generator) for n in lengths])
        for prompt, lengths in zip(prompts_of(llava), ((4, 1), (3, 5, 2), (6,)), strict=True)
    ]
    assert {len(prompt.mm_inputs.get("pixel_values", ())) for prompt, _ in groups} == {0, 1, 2}
    packed = pack([(p.input_ids, c) for p, c in groups], torch.device("cpu"), [p for p, _ in groups])
    logprobs, entropy = llava(packed, 0.7, True)
    weights = torch.randn(len(logprobs), dtype=torch.float64, generator=generator)
    (logprobs @ weights).backward()
    ours = flat_gradient(llava.base_model.get_decoder())
    llava.zero_grad()
    expected = one_by_one(llava.base_model, groups)
    (expected @ weights).backward()
    assert relative_distance(logprobs, expected) < 1e-6
    assert relative_distance(ours, flat_gradient(llava.base_model.get_decoder())) < 1e-6
    assert entropy.min() > 0


def test_prompts_that_begin_alike_are_completed_in_their_padded_rows(llava):
    generator = torch.Generator().manual_seed(2)
    begin = torch.randint(20, 900, (18,), generator=generator)
    prompts = [Prompt(str(n), "", torch.cat([begin, torch.arange(20 + n, 24 + 2 * n)]), {}) for n in range(3)]
    groups = [(p, [torch.randint(20, 900, (n,), generator=generator) for n in (1, 4)]) for p in prompts]
    packed = pack([(p.input_ids, c) for p, c in groups], torch.device("cpu"), prompts)
    assert packed.layout.common == 18
    with torch.no_grad():
        assert relative_distance(llava(packed, 0.7)[0], one_by_one(llava.base_model, groups)) < 1e-6
    # They are forwarded whole: the planner must not count on anything that they share.
    assert llava.is_padded and llava.least_common == sys.maxsize
    alone = pack([(p.input_ids, c) for p, c in groups], torch.device("cpu"), prompts, least_common=llava.least_common)
    assert alone.layout.common == 0


def test_images_matter_and_no_part_of_the_tower_trains(llava, llava_dir):
    one, _, _ = prompts_of(llava)
    other = encoded(llava, "one", "what?", Image.linear_gradient("L").resize((30, 30)).convert("RGB"))
    completion = torch.tensor([30, 40, 50])
    values = [llava(pack([(p.input_ids, [completion])], torch.device("cpu"), [p]))[0].detach() for p in (one, other)]
    assert relative_distance(*values) > 1e-3
    trained = [name for name, p in llava.named_parameters() if p.requires_grad]
    assert trained and not any("vision_tower" in name or "projector" in name for name in trained)
    with pytest.warns(UserWarning, match="falling back"):
        adapted = PolicyLoader(str(llava_dir), lora=LoraSettings(r=2, alpha=4)).load()
    adapters = [name for name, p in adapted.named_parameters() if p.requires_grad]
    assert adapters and not any("vision_tower" in name or "projector" in name for name in adapters)


@pytest.mark.parametrize("penalty", [1.0, 1.3])
def test_what_was_sampled_has_the_log_probability_the_policy_gives_it(llava, penalty):
    sampling = SamplingParams(3, 6, temperature=0.7, repetition_penalty=penalty)
    first, again = (TransformersEngine().generate(llava, prompts_of(llava), sampling, 5) for _ in range(2))
    tokens = [[c.token_ids for c in group] for group in first.completions]
    assert all(
        torch.equal(a.token_ids, b.token_ids)
        for x, y in zip(first.completions, again.completions, strict=True)
        for a, b in zip(x, y, strict=True)
    )
    assert len({tuple(t.tolist()) for group in tokens for t in group}) == 9
    assert all(not (t[:-1] == 2).any() for group in tokens for t in group)
    if penalty == 1.0:
        packed = pack(
            [(p.input_ids, t) for p, t in zip(first.prompts, tokens, strict=True)], torch.device("cpu"), first.prompts
        )
        sampled = torch.cat([c.sampler_logprobs for group in first.completions for c in group])
        torch.testing.assert_close(llava(packed, 0.7)[0].float().detach(), sampled, atol=2e-5, rtol=0)


def test_behind_an_image_a_placeholder_is_neither_sampled_nor_counted_and_elsewhere_is_a_token(llava, monkeypatch):
    """The model's forward would put features in the place of one that was sampled."""
    head = llava.base_model.lm_head.forward
    liking = torch.zeros(llava.base_model.lm_head.out_features, dtype=torch.float64).index_fill(
        0, torch.tensor(IMAGE_ID), 50.0
    )
    monkeypatch.setattr(llava.base_model.lm_head, "forward", lambda hidden: head(hidden) + liking)
    rollout = TransformersEngine().generate(llava, prompts_of(llava), SamplingParams(3, 6, temperature=0.7), 5)
    groups = [(p, [c.token_ids for c in own]) for p, own in zip(rollout.prompts, rollout.completions, strict=True)]
    for prompt, completions in groups:
        drawn = torch.cat(completions)
        assert (drawn == IMAGE_ID).sum() == (0 if prompt.mm_inputs else len(drawn))
    packed = pack([(p.input_ids, c) for p, c in groups], torch.device("cpu"), [p for p, _ in groups])
    with torch.no_grad():
        logprobs, entropy = llava(packed, 0.7, True)
    sampled = torch.cat([c.sampler_logprobs for own in rollout.completions for c in own])
    torch.testing.assert_close(logprobs.float(), sampled, atol=2e-5, rtol=0)
    assert relative_distance(logprobs, one_by_one(llava.base_model, groups).detach()) < 1e-6
    behind = torch.cat([torch.full((len(c),), bool(p.mm_inputs)) for p, own in groups for c in own])
    assert entropy[behind].min() > 1.0 and entropy[~behind].max() < 1e-9


def test_what_the_model_was_published_with_for_generate_does_not_change_what_is_sampled(llava, monkeypatch):
    """The policy's log-probabilities know of no penalty, so the sampler must not either."""
    model, sampling = llava.base_model, SamplingParams(3, 6, temperature=0.7)
    plain = TransformersEngine().generate(llava, prompts_of(llava), sampling, 5)
    own = GenerationConfig(eos_token_id=2, repetition_penalty=1.3)
    monkeypatch.setattr(model, "generation_config", own)
    penalised = TransformersEngine().generate(llava, prompts_of(llava), sampling, 5)
    for before, after in zip(sum(plain.completions, []), sum(penalised.completions, []), strict=True):
        assert torch.equal(before.token_ids, after.token_ids)
        assert torch.equal(before.sampler_logprobs, after.sampler_logprobs)
    assert model.generation_config is own and own.repetition_penalty == 1.3
    monkeypatch.setattr(type(model), "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TransformersEngine().generate(llava, prompts_of(llava), sampling, 5)
    assert model.generation_config is own


def test_stop_strings_and_ends_stop_their_row_alone(llava):
    free = TransformersEngine().generate(llava, prompts_of(llava)[:1], SamplingParams(4, 8), 3).completions[0]
    stop = llava.tokenizer.decode(free[0].token_ids[2:3], skip_special_tokens=True)
    assert stop
    limited = TransformersEngine().generate(llava, prompts_of(llava)[:1], SamplingParams(4, 8, stop=(stop,)), 3)
    for before, after in zip(free, limited.completions[0], strict=True):
        assert torch.equal(before.token_ids[: len(after.token_ids)], after.token_ids)
        assert (after.finish_reason == "stop") == (stop in after.text or after.token_ids[-1] == 2)
    assert len(limited.completions[0][0].token_ids) <= 3


def test_features_that_do_not_fit_the_placeholders_stop_the_run_with_the_row(llava):
    one, _, _ = prompts_of(llava)
    ids = one.input_ids
    cut = Prompt("one", "", ids[ids != IMAGE_ID], {}, one.mm_inputs)
    with pytest.raises(UserError, match="row one: the model rejects its images"):
        llava(pack([(cut.input_ids, [torch.tensor([5, 6])])], torch.device("cpu"), [cut]))


def test_limits_on_pixels_are_refused_where_all_images_become_one_size(llava):
    message = [{"role": "user", "content": [{"type": "image", "image": Image.new("RGB", (9, 9))}]}]
    with pytest.raises(UserError, match=r"max_pixels have no effect: CLIPImageProcessor.* does not count pixels"):
        encode_conversation(message, llava.processor, VisionSettings(max_pixels=900), {}, "row x")


def test_an_environment_needs_a_model_that_packs(llava):
    engine = TransformersEngine(environments=object.__new__(Environments))
    with pytest.raises(
        UserError, match="LlavaForConditionalGeneration runs padded and cannot continue where a turn ends"
    ):
        engine.generate(llava, prompts_of(llava)[:1], SamplingParams(2, 4), 0)


def test_soft_capped_scores_run_padded_and_are_the_models_own():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, head_dim=16,
        num_key_value_heads=1, attn_logit_softcapping=2.0, final_logit_softcapping=3.0, sliding_window=4, pad_token_id=0,
        attn_implementation="gspo_shared_prefix",
    )  # fmt: skip
    model = Gemma2ForCausalLM(config).double()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
    policy = Policy(model.train(), None)
    with pytest.warns(UserWarning, match="soft-capped scores are not part .*; falling back to padded forwards"):
        choose_forward(policy)
    groups = random_groups([(7, (3, 6)), (2, (4,))], 64)
    logprobs, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    expected = one_by_one(model, [(make_prompt(p), c) for p, c in groups])
    assert relative_distance(logprobs, expected) < 1e-6


def test_a_head_that_scales_its_logits_runs_padded_and_exact(micro_model_dir):
    policy = micro_policy(micro_model_dir)
    original = policy.base_model.lm_head.forward
    policy.base_model.lm_head.forward = lambda hidden: 2 * original(hidden)
    with pytest.warns(UserWarning, match="packed log-probabilities are .* away .*; falling back"):
        choose_forward(policy)
    groups = random_groups([(7, (3, 6)), (2, (4,))], 64)
    logprobs, _ = policy(pack(groups, torch.device("cpu")), 0.7)
    assert relative_distance(logprobs, one_by_one(policy.base_model, [(make_prompt(p), c) for p, c in groups])) < 1e-6


def test_train_py_trains_it_on_rows_with_and_without_images(llava_dir, tmp_path):
    rows = []
    for number in range(10):
        Image.new("RGB", (30 + number, 40), (25 * number, 0, 0)).save(tmp_path / f"{number}.png")
        content = [{"type": "image", "image": str(tmp_path / f"{number}.png")}] * (number % 3)
        content.append({"type": "text", "text": f"colour {number}?"})
        rows.append({"prompt": [{"role": "user", "content": content}], "letter": "e"})
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = run(
        f"model.path={llava_dir}", "data=rows", f"data.task.source={tmp_path}/rows.jsonl",
         "reward=letters", "logger=none", "trainer.precision=32-true", "data.task.num_validation=2", "data.prompts_per_rollout=4", "update.num_minibatches=2",
         "rollout.num_generations=3", "rollout.max_completion_length=5", "max_rollouts=2", f"hydra.run.dir={tmp_path}/run",
    )  # fmt: skip
    assert "llava reads images in a way that packing does not know" in done.stderr
    assert AutoModelForImageTextToText.from_pretrained(tmp_path / "run" / "model").config.model_type == "llava"
