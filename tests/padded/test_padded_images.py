"""Padded rows behind images, in models whose forward asks for more than placeholders: PaliGemma and Mllama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoTokenizer,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PaliGemmaProcessor,
)
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.errors import UserError
from gspo_lightning.packing import pack
from gspo_lightning.policy import padded
from gspo_lightning.policy.load import PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rollout import TransformersEngine
from gspo_lightning.types import Prompt, SamplingParams
from tests.support import flat_gradient, relative_distance

IMAGE, IMAGE_ID, VOCABULARY = "<image>", 7, 49_152  # PaliGemma's processor knows no other name
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<image>{% else %}{{ p.text }}{% endif %}{% endfor %}\n{% endfor %}"
)
TEXT = {
    "vocab_size": VOCABULARY, "hidden_size": 48, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
TOWER = {"hidden_size": 32, "intermediate_size": 48, "patch_size": 14, "num_hidden_layers": 2}


def paligemma(tokenizer: Any) -> tuple[Any, Any]:
    config = PaliGemmaConfig(
        text_config={**TEXT, "model_type": "gemma", "head_dim": 12, "num_hidden_layers": 2},
        vision_config={**TOWER, "num_attention_heads": 2, "image_size": 28, "projection_dim": 48},
        image_token_index=IMAGE_ID, projection_dim=48, hidden_size=48, pad_token_id=2,
    )  # fmt: skip
    images = SiglipImageProcessorPil(size={"height": 28, "width": 28})
    images.image_seq_length = 4
    return PaliGemmaForConditionalGeneration(config), PaliGemmaProcessor(images, tokenizer, chat_template=TEMPLATE)


def mllama(tokenizer: Any) -> tuple[Any, Any]:
    config = MllamaConfig(
        text_config={**TEXT, "num_hidden_layers": 3, "cross_attention_layers": [1],
                     "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        vision_config={**TOWER, "attention_heads": 2, "num_global_layers": 1, "image_size": 56, "max_num_tiles": 2,
                       "vision_output_dim": 64, "intermediate_layers_indices": [0],
                       "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]]},
        image_token_index=IMAGE_ID,
    )  # fmt: skip
    images = MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=2)
    return MllamaForConditionalGeneration(config), MllamaProcessor(images, tokenizer, chat_template=TEMPLATE)


def tokenizer_in(folder: Path, smollm2_dir: Path) -> Any:
    """SmolLM2's, with the placeholder in place of a token that no text has."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text((smollm2_dir / name).read_text().replace("<gh_stars>", IMAGE))
    return AutoTokenizer.from_pretrained(folder, extra_special_tokens={"image_token": IMAGE})


@pytest.fixture(scope="module", params=[paligemma, mllama], ids=["paligemma", "mllama"])
def policy(request: Any, smollm2_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Policy:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    model, processor = request.param(tokenizer_in(tmp_path_factory.mktemp("tokenizer"), smollm2_dir))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            elif name.endswith("gate"):
                parameter.fill_(1.0)  # Mllama begins without its images
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    with pytest.warns(UserWarning, match="falling back to padded forwards"):
        return PolicyLoader(str(folder), dtype="float64").load()


def prompts_of(policy: Policy) -> list[Prompt]:
    red, tall = Image.new("RGB", (30, 30), (255, 0, 0)), Image.linear_gradient("L").resize((40, 90)).convert("RGB")
    prompts = []
    for uid, images in (("one", [red]), ("two", [red, tall])):
        parts: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
        messages = [{"role": "user", "content": [*parts, {"type": "text", "text": "what is it?"}]}]
        prompts.append(
            Prompt(uid, messages, *_encoded(messages, policy))  # type: ignore[arg-type]
        )
    return prompts


def _encoded(messages: Any, policy: Policy) -> tuple[Tensor, dict[str, Any], dict[str, Tensor]]:
    ids, inputs = encode_conversation(messages, policy.processor, VisionSettings(), {}, "row x")
    return ids, {}, inputs


def row_of(groups: list[tuple[Prompt, list[Tensor]]]) -> Any:
    return pack([(p.input_ids, c) for p, c in groups], torch.device("cpu"), [p for p, _ in groups])


def alone(model: Any, prompt: Prompt, completion: Tensor) -> Tensor:
    """One sequence, with what its model's `generate` would have lengthened its inputs to."""
    media, count = dict(prompt.mm_inputs), len(completion)
    if "token_type_ids" in media:  # of PaliGemma
        media["token_type_ids"] = torch.cat([media["token_type_ids"], torch.ones(1, count, dtype=torch.long)], 1)
    if "cross_attention_mask" in media:  # of Mllama
        mask = media["cross_attention_mask"]
        media["cross_attention_mask"] = torch.cat([mask, *[mask[:, -1:]] * count], 1)
    logits = model(input_ids=torch.cat([prompt.input_ids, completion])[None], **media).logits
    logits = logits[0, len(prompt.input_ids) - 1 : -1].index_fill(-1, torch.tensor([IMAGE_ID]), -torch.inf)
    return torch.log_softmax(logits, dim=-1).gather(1, completion[:, None]).squeeze(1)


def test_log_probabilities_and_gradients_are_those_of_every_sequence_alone(policy: Policy) -> None:
    generator = torch.Generator().manual_seed(1)
    groups = [
        (prompt, [torch.randint(20, 900, (n,), generator=generator) for n in lengths])
        for prompt, lengths in zip(prompts_of(policy), ((4, 1), (3, 5, 2)), strict=True)
    ]
    assert "labels" not in groups[0][0].mm_inputs
    logprobs, entropy = policy(row_of(groups), 1.0, True)
    weights = torch.randn(len(logprobs), dtype=torch.float64, generator=generator)
    (logprobs @ weights).backward()
    ours = flat_gradient(policy.base_model.get_decoder())
    policy.zero_grad()
    expected = torch.cat([alone(policy.base_model, p, c) for p, own in groups for c in own])
    (expected @ weights).backward()
    # transformers rounds rotary cosines to float32, differently in the middle and at the end of a row on some processors.
    assert relative_distance(logprobs, expected) < 1e-7
    assert relative_distance(ours, flat_gradient(policy.base_model.get_decoder())) < 1e-6
    assert entropy.isfinite().all() and entropy.min() > 0


def test_what_was_sampled_has_the_log_probability_the_policy_gives_it(policy: Policy) -> None:
    rollout = TransformersEngine().generate(policy, prompts_of(policy), SamplingParams(3, 6), 5)
    groups = [(p, [c.token_ids for c in own]) for p, own in zip(rollout.prompts, rollout.completions, strict=True)]
    sampled = torch.cat([c.sampler_logprobs for own in rollout.completions for c in own])
    with torch.no_grad():
        torch.testing.assert_close(policy(row_of(groups))[0].float(), sampled, atol=2e-5, rtol=0)


def test_a_prompt_that_sees_its_completion_is_refused_before_anything_is_sampled(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy.base_model
    if model.config.model_type != "paligemma":
        pytest.skip("its prompts see nothing behind them, whatever the types of tokens are")
    monkeypatch.setattr(model.config, "model_type", "another")
    padded._checked.discard(model)
    with pytest.raises(UserError, match="row one: models of type another cannot be trained on images: .* differ by"):
        TransformersEngine().generate(policy, prompts_of(policy), SamplingParams(3, 6), 5)


def test_a_model_that_fails_at_padded_rows_is_refused_in_one_line(
    policy: Policy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def not_lengthened(media: Any, rows: int, *_: Any) -> Any:
        return {name: torch.cat([value] * rows) for name, value in media.items()}

    kind = policy.base_model.config.model_type
    if kind != "mllama":
        pytest.skip("takes the types of fewer tokens than there are")
    monkeypatch.setattr(padded, "repeated_media", not_lengthened)
    padded._checked.discard(policy.base_model)
    with pytest.raises(UserError, match=rf"^row one: models of type {kind} cannot be trained on images \(\w+: [^\n]+$"):
        TransformersEngine().generate(policy, prompts_of(policy), SamplingParams(3, 6), 5)


def test_an_input_that_generate_does_not_know_is_refused_in_one_line(policy: Policy) -> None:
    prompt = prompts_of(policy)[0]
    padded._checked.discard(policy.base_model)
    odd = replace(prompt, mm_inputs={**prompt.mm_inputs, "depth_map": prompt.input_ids})
    line = r"^row one: .* cannot be trained on images \(ValueError: .*'depth_map'[^\n]+$"
    for _ in range(2):  # who tries again is refused again
        with pytest.raises(UserError, match=line):
            padded.check_images(policy.base_model, odd)
