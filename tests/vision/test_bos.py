"""A prompt with an image begins as transformers' own processor begins it: with one BOS, whoever writes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer, LlavaProcessor

from gspo_lightning.data.vision import VisionSettings, encode_conversation

IMAGE = "<file_sep>"
TEMPLATE = (
    "{% for m in messages %}{% for p in m.content %}"
    "{% if p.type == 'image' %}<file_sep>{% else %}{{ p.text }}{% endif %}{% endfor %}{% endfor %}"
)


@pytest.fixture
def processor(smollm2_dir: Path) -> Any:
    """A processor whose tokenizer puts BOS before every text, as Gemma 3's does."""
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", pair="<|endoftext|> $A $B", special_tokens=[("<|endoftext|>", 0)]
    )
    images = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    return LlavaProcessor(
        images, tokenizer, patch_size=14, vision_feature_select_strategy="default", image_token=IMAGE,
        num_additional_image_tokens=1,
    )  # fmt: skip


@pytest.mark.parametrize("template", ["{{ bos_token }}" + TEMPLATE, TEMPLATE], ids=["template", "tokenizer"])
@pytest.mark.parametrize("settings", [VisionSettings(), VisionSettings(max_pixels=10_000)], ids=["own", "limited"])
def test_a_prompt_with_an_image_has_one_bos(processor: Any, template: str, settings: VisionSettings) -> None:
    processor.chat_template = template
    if settings.is_set:
        processor.image_processor.size = {"shortest_edge": 28, "longest_edge": 28}
        processor.image_processor.patch_size, processor.image_processor.merge_size = 14, 1  # as if it counted pixels
    parts = [{"type": "image", "image": Image.new("RGB", (28, 28))}, {"type": "text", "text": "hi"}]
    messages = [{"role": "user", "content": parts}]
    ids, _ = encode_conversation(messages, processor, settings, {}, "row x")
    # 28 by 28 pixels are 2 by 2 patches of 14.
    assert processor.tokenizer.convert_ids_to_tokens(ids) == ["<|endoftext|>", *[IMAGE] * 4, "hi"]
    if not settings.is_set:
        theirs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)["input_ids"]
        assert [ids.tolist()] == theirs


def test_a_prompt_with_an_image_does_not_end_in_the_eos_that_its_tokenizer_adds(processor: Any) -> None:
    """As a plain prompt does not; one that the template writes stays."""
    tokenizer = processor.tokenizer
    end = tokenizer.eos_token
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"$A {end}", special_tokens=[(end, tokenizer.eos_token_id)]
    )
    assert tokenizer("hi")["input_ids"][1:] == [tokenizer.eos_token_id]
    parts = [{"type": "image", "image": Image.new("RGB", (28, 28))}, {"type": "text", "text": "hi"}]
    for written, ending in (("", []), (end, [end])):
        processor.chat_template = TEMPLATE + written
        messages = [{"role": "user", "content": parts}]
        ids, inputs = encode_conversation(messages, processor, VisionSettings(), {}, "row x")
        found = tokenizer.convert_ids_to_tokens(ids)
        assert found[:5] == [*[IMAGE] * 4, "hi"] and found[5:] in (ending, [*ending, *ending])
        assert all(inputs[name].shape[-1] == len(ids) for name in inputs.keys() & {"mm_token_type_ids"})
