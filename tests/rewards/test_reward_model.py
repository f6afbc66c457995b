"""The reward model gives each text the logit that transformers gives it alone, unpadded."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from gspo_lightning.errors import UserError
from gspo_lightning.policy.micro import build_micro_model, build_micro_tokenizer
from gspo_lightning.rewards import RewardModel, RewardSet, RewardSpec
from tests.rewards.test_reward_set import batch

TEXTS = ["a", "abcabc", "ab", "hello there", "z"]


def build(folder, pad_token_id, num_labels=1):
    tokenizer = build_micro_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_labels=num_labels, pad_token_id=pad_token_id,
    )  # fmt: skip
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def alone(folder, text):
    """Each text by itself, without padding."""
    model = LlamaForSequenceClassification.from_pretrained(folder).eval()
    model.config.pad_token_id = model.config.vocab_size + 1  # no token is padding
    ids = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        return model(input_ids=ids).logits.item()


@pytest.mark.parametrize("pad_token_id", [None, 1])
def test_logits_are_those_of_each_text_alone(tmp_path, pad_token_id):
    folder = build(tmp_path, pad_token_id)
    reward = RewardModel(str(folder), batch_size=2)
    expected = [alone(folder, "say " + text) for text in TEXTS]
    assert reward(prompts=["say "] * 5, completions=TEXTS) == pytest.approx(expected, abs=1e-5)
    assert len({round(x, 6) for x in expected}) == 5


def test_it_is_loaded_late_frozen_and_works_in_a_process(tmp_path):
    reward = RewardModel(str(build(tmp_path, None)))
    assert reward._model is None
    value = reward(prompts=["a"], completions=["b"])
    assert not any(p.requires_grad for p in reward._model.parameters()) and not reward._model.training
    prompts, completions = batch()
    rewards = RewardSet({"model": RewardSpec(RewardModel(str(tmp_path)), timeout_s=60.0)})
    try:
        table = rewards(prompts[1:], completions[1:])
        assert table.flatten().tolist() == pytest.approx([alone(tmp_path, f"plainc1{g}") for g in range(2)], abs=1e-5)
    finally:
        rewards.close()
    assert len(value) == 1


def test_what_is_no_reward_model_is_refused(tmp_path):
    build_micro_model(tmp_path / "lm")
    with pytest.raises(UserError, match="is not a trained classifier: it lacks"):
        RewardModel(str(tmp_path / "lm"))(prompts=["a"], completions=["b"])
    with pytest.raises(UserError, match="has 3 outputs"):
        RewardModel(str(build(tmp_path / "three", None, 3)))(prompts=["a"], completions=["b"])
    with pytest.raises(UserError, match="a sequence has [0-9]+ tokens; max_length is 2"):
        RewardModel(str(build(tmp_path / "one", None)), max_length=2)(prompts=["abc"], completions=["b"])
    with pytest.raises(UserError, match="RewardModel.path=.*/nothing cannot be used .*give a folder or hub name"):
        RewardModel(str(tmp_path / "nothing"))(prompts=["a"], completions=["b"])


def refusal(folder):
    with pytest.raises(UserError) as caught:
        RewardModel(str(folder))(prompts=["a"], completions=["b"])
    message = str(caught.value)
    assert message.startswith(f"RewardModel.path={folder} cannot be used (") and "\n" not in message
    assert message.endswith("its weights in safetensors, with its tokenizer")
    return message


def test_pickled_weights_are_not_read(tmp_path):
    """A right model whose weights or adapter are pickled is refused, so nothing in a pickle is ever read."""
    folder = build(tmp_path / "pickled", None)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "no file named model.safetensors" in refusal(folder)
    folder = build(tmp_path / "adapter", None)
    adapter = get_peft_model(LlamaForSequenceClassification.from_pretrained(folder), LoraConfig(task_type="SEQ_CLS"))
    adapter.save_pretrained(folder)
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    assert RewardModel(str(folder))(prompts=["a"], completions=["b"])
    (folder / "adapter_model.safetensors").unlink()
    assert "adapter_model.safetensors" in refusal(folder)


def test_code_beside_the_weights_does_not_run(tmp_path, monkeypatch):
    """Nobody is asked whether it may."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = build(tmp_path / "model", None)
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "own", "auto_map": {"AutoConfig": "own.Config"}}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Config: pass\n")
    assert "contains custom code" in refusal(folder)
    assert not (tmp_path / "ran").exists()


def test_broken_weights_are_refused_in_one_line(tmp_path):
    folder = build(tmp_path / "broken", None)
    (folder / "model.safetensors").write_bytes(b"xx")
    assert "header too small" in refusal(folder)
    folder = build(tmp_path / "other_shape", None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 64}))
    assert "RuntimeError" in refusal(folder)


def test_text_in_parts_is_the_text(tmp_path):
    reward = RewardModel(str(build(tmp_path, None)))
    parts = [{"type": "text", "text": "sa"}, {"type": "text", "text": "y"}]
    prompts = [[{"role": "user", "content": content}] for content in ("say", parts)]
    values = reward(prompts=prompts, completions=[[{"role": "assistant", "content": "a"}]] * 2)
    talk = "<|im_start|>user\nsay<|im_end|>\n<|im_start|>assistant\na<|im_end|>\n"
    assert values == pytest.approx([alone(tmp_path, talk)] * 2, abs=1e-5)


@pytest.mark.parametrize("bad", [{"batch_size": 0}, {"max_length": 0}, {"dtype": "int8"}, {"device": "abacus"}])
def test_bad_settings_are_refused_by_name(bad):
    with pytest.raises(UserError, match=f"RewardModel.{next(iter(bad))}"):
        RewardModel("nowhere", **bad)


def test_in_a_process_it_has_the_gpu_of_its_rank(monkeypatch):
    """Whose current GPU would be the first one."""
    sent = [RewardModel("m", device=name) for name in ("cuda", "cuda:1", "cpu")]
    assert [pickle.loads(pickle.dumps(model)).device for model in sent] == ["cuda", "cuda:1", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    assert [pickle.loads(pickle.dumps(model)).device for model in sent] == ["cuda:3", "cuda:1", "cpu"]
