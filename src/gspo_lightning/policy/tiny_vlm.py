"""A vision-language model that is not random and runs on a laptop: ``bundled:tiny-vlm``.

Its language half is SmolLM2-135M-Instruct inside the Qwen2.5-VL architecture: with zero query, key and value biases
and M-RoPE sections that cover the head it computes the same logits on text, to the last bit. Its vision half is
small (1.4 M parameters) and learns alone, on images of the package ``easy-vqa``: first to see (`tiny_vlm_sight`),
then, through the language model, to answer open questions. The warm-up stops on purpose while half the answers are
wrong: it is a start for reinforcement learning, not a solution.
"""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import Any

import torch

from gspo_lightning.data.easy_vqa import EasyVQA
from gspo_lightning.data.vision import VisionSettings, encode_conversation
from gspo_lightning.packing import pack
from gspo_lightning.policy.attention import attention_implementation, register
from gspo_lightning.policy.model import Policy
from gspo_lightning.policy.processor import ImageTextProcessor
from gspo_lightning.policy.tiny_vlm_sight import learn_to_see
from gspo_lightning.types import Prompt

log = logging.getLogger(__name__)

SPECIAL_IDS = {"<|vision_start|>": 3, "<|vision_end|>": 4, "<|image_pad|>": 5, "<|video_pad|>": 6}
"""Ids that SmolLM2 reserves for file names and the like, and that no text uses."""

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
BATCH = 32
MAX_STEPS = 400
EVALUATE_EVERY = 2
STOP_AT = 0.45
"""Sampled accuracy at which the warm-up ends, on held-out images of its own half of the data."""


def build_language_half(smollm2: Path) -> Any:
    """A Qwen2.5-VL model whose language half holds the weights of SmolLM2; its vision half is random (seed 0)."""
    from transformers import AutoModelForCausalLM, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    source: Any = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32, trust_remote_code=False)
    theta = source.config.rope_parameters["rope_theta"]
    text = {
        key: getattr(source.config, key)
        for key in (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "bos_token_id", "eos_token_id",
            "pad_token_id",
        )
    }  # fmt: skip
    text |= {
        "rope_parameters": {"rope_type": "default", "rope_theta": theta, "mrope_section": [8, 12, 12]},
        "tie_word_embeddings": True,
    }
    vision = {
        "depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "out_hidden_size": 576,
        "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2, "window_size": 112,
        "fullatt_block_indexes": [1, 3],
    }  # fmt: skip
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=SPECIAL_IDS["<|image_pad|>"],
        video_token_id=SPECIAL_IDS["<|video_pad|>"],
        vision_start_token_id=SPECIAL_IDS["<|vision_start|>"],
        vision_end_token_id=SPECIAL_IDS["<|vision_end|>"],
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model: Any = Qwen2_5_VLForConditionalGeneration(config).to(torch.float32)
    missing, unexpected = model.model.language_model.load_state_dict(source.model.state_dict(), strict=False)
    assert not unexpected and all(name.endswith("_proj.bias") for name in missing)
    with torch.no_grad():
        for name in missing:
            model.model.language_model.get_parameter(name).zero_()
    model.tie_weights()
    model.generation_config.eos_token_id = [source.config.eos_token_id]
    model.generation_config.pad_token_id = source.config.pad_token_id
    return model


def build_processor(smollm2: Path, scratch: Path) -> Any:
    """SmolLM2's tokenizer with image placeholders in unused ids, and an image processor for 84 x 84 images."""
    from transformers import AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    for name in ("tokenizer.json", "tokenizer_config.json"):
        (scratch / name).write_bytes((smollm2 / name).read_bytes())
    content = json.loads((scratch / "tokenizer.json").read_text(encoding="utf-8"))
    names = {number: token for token, number in SPECIAL_IDS.items()}
    for token in content["added_tokens"]:
        token["content"] = names.get(token["id"], token["content"])
    content["model"]["vocab"] = {names.get(i, token): i for token, i in content["model"]["vocab"].items()}
    (scratch / "tokenizer.json").write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    tokenizer = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False)
    tokenizer.chat_template = CHAT_TEMPLATE
    images = Qwen2VLImageProcessorPil(min_pixels=84 * 84, max_pixels=84 * 84)
    return ImageTextProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


def build_tiny_vlm(folder: Path, smollm2: Path) -> None:
    """Writes the warmed-up model to ``folder``; four to ten minutes on two cores.

    Raises:
        UserError: the package ``easy-vqa`` is not installed.
    """
    task = EasyVQA(part="warmup")
    task.check()
    log.info(
        "making the tiny vision-language model once: a supervised warm-up of its vision half, which takes some minutes"
    )
    register()
    processor = build_processor(smollm2, folder)
    model = build_language_half(smollm2)
    model.set_attn_implementation(attention_implementation("auto", has_vision=True))
    model.requires_grad_(False)
    model.model.visual.requires_grad_(True)
    policy = Policy(model, processor.tokenizer, has_vision=True, processor=processor)
    learn_to_see(model, processor, task)
    accuracy, steps, seconds = _warm_up(policy, task)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    facts = {"sampled_accuracy": accuracy, "steps": steps, "seconds": round(seconds, 1)}
    (folder / "warm_up.json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
    log.info("warm-up ended after %d steps and %.0f s at sampled accuracy %.2f", steps, seconds, accuracy)


def _warm_up(policy: Policy, task: EasyVQA) -> tuple[float, int, float]:
    """Trains the tower on answers until ``STOP_AT``; returns held-out sampled accuracy, steps and seconds."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    generator = torch.Generator().manual_seed(0)
    held_out = [_example(policy, row, f"held_out:{n}") for n, row in enumerate(task.validation_rows())]
    start, step, accuracy = time.perf_counter(), 0, 0.0
    for step in range(1, MAX_STEPS + 1):
        for group in optimizer.param_groups:
            group["lr"] = 1e-3 * min(1.0, step / 20)
        picks = torch.randint(task.num_train_rows, (BATCH,), generator=generator).tolist()
        batch = [_example(policy, task.train_row(i), f"warm_up:{i}") for i in picks]
        loss = -_answer_logprobs(policy, batch)[0].mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if step % EVALUATE_EVERY == 0:
            accuracy = _sampled_accuracy(policy, held_out)
            log.info("step %d, %.0f s: loss %.3f, sampled accuracy %.3f",
                     step, time.perf_counter() - start, loss.item(), accuracy)  # fmt: skip
            if accuracy >= STOP_AT:
                break
    return accuracy, step, time.perf_counter() - start


Example = tuple[Prompt, torch.Tensor]


def _example(policy: Policy, row: dict[str, Any], uid: str) -> Example:
    ids, mm_inputs = encode_conversation(row["prompt"], policy.processor, VisionSettings(), {}, f"row {uid}")
    tokens = policy.tokenizer(row["answer"])["input_ids"]
    return Prompt(uid, row["prompt"], ids, row, mm_inputs), torch.tensor([*tokens, policy.tokenizer.eos_token_id])


def _answer_logprobs(policy: Policy, batch: list[Example]) -> tuple[torch.Tensor, torch.Tensor]:
    packed = pack([(p.input_ids, [answer]) for p, answer in batch], policy.device, [p for p, _ in batch])
    with torch.autocast("cpu", torch.bfloat16, enabled=torch.cpu._is_avx512_bf16_supported()):
        logprobs, _ = policy(packed)
    return logprobs, packed.sequence_index


@torch.no_grad()
def _sampled_accuracy(policy: Policy, examples: list[Example]) -> float:
    """Probability of the right answer, to the end of sequence: what sampling at temperature 1 gets on average."""
    total = 0.0
    for start in range(0, len(examples), 64):
        batch = examples[start : start + 64]
        logprobs, index = _answer_logprobs(policy, batch)
        total += torch.zeros(len(batch)).index_add_(0, index, logprobs).exp().sum().item()
    return total / len(examples)
