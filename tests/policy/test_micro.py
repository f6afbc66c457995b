"""The micro model: the same for ever, and with the traps that a test model must have."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gspo_lightning.policy.micro import CHARACTERS, build_micro_model
from gspo_lightning.policy.smollm2 import sha256

WEIGHTS = "model.safetensors"


def test_the_seed_alone_decides_the_bytes(micro_model_dir: Path, tmp_path: Path) -> None:
    torch.manual_seed(123)
    torch.set_default_dtype(torch.float64)
    state = torch.random.get_rng_state()
    build_micro_model(tmp_path / "same")
    assert torch.equal(torch.random.get_rng_state(), state), "building must not touch the global random state"
    build_micro_model(tmp_path / "other", seed=1)
    assert sha256(tmp_path / "same" / WEIGHTS) == sha256(micro_model_dir / WEIGHTS)
    assert sha256(tmp_path / "other" / WEIGHTS) != sha256(micro_model_dir / WEIGHTS)


def test_it_has_grouped_heads_tied_embeddings_and_no_dropout(micro_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(micro_model_dir)
    config = model.config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 16)
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert config.attention_dropout == 0.0 and model.dtype == torch.float32
    # Embedding; per layer q, o, then k, v, then the three of the MLP, then two norms; the final norm.
    assert model.num_parameters() == 99 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128 + 2 * 64) + 64


def test_its_predictions_depend_on_the_whole_context(micro_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(micro_model_dir).double()
    ids = torch.arange(10, 26)[None]
    with torch.no_grad():
        plain = model(ids).logits[0, -1].log_softmax(-1)
        for position in (0, 7, 14):
            changed = ids.clone()
            changed[0, position] = 50
            # 1e-3 nats is a million times the bounds that tests of equality use.
            assert (model(changed).logits[0, -1].log_softmax(-1) - plain).abs().max() > 1e-3
        assert (plain.exp().sum() - 1).abs() < 1e-12
        # Near uniform (ln 99 = 4.6) but not uniform: samples vary, and advantages have something to push.
        assert 3.5 < -(plain.exp() * plain).sum() < 4.58


def test_one_token_per_character_and_back(micro_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_model_dir)
    ids = tokenizer(CHARACTERS).input_ids
    assert ids == list(range(3, 99))
    assert tokenizer.decode(ids) == CHARACTERS
    assert tokenizer("é").input_ids == [tokenizer.unk_token_id] == [0]


def test_pad_is_eos_and_the_template_marks_turns(micro_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(micro_model_dir)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    messages = [{"role": "user", "content": "1+1?"}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert tokenizer.decode(ids) == "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "user\n1+1?\nassistant\n"
    # start, "user\n", "1+1?", end, newline, start, "assistant\n"
    assert len(ids) == 1 + 5 + 4 + 1 + 1 + 1 + 10


def test_it_generates_until_eos_offline(micro_model_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(micro_model_dir)
    assert model.generation_config.eos_token_id == [2]
    assert model.generation_config.pad_token_id == 2
