"""A random gpt-oss small enough for a unit test: sinks, alternating sliding windows, experts, and the harmony format.

The weights mean nothing; everything else is as in gpt-oss-20b, so what runs here runs there: the same architecture in
transformers, the same special tokens around the turns, and a template that reads ``reasoning_effort``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from gspo_lightning.policy.micro import UNK_TOKEN, character_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

SPECIAL_TOKENS = (
    UNK_TOKEN, "<|endoftext|>", "<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>",
)  # fmt: skip
CHAT_TEMPLATE = (
    "{{ '<|start|>system<|message|>Reasoning: ' + (reasoning_effort or 'medium') + '\\n\\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message.<|end|>' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}"
    "{{ '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' }}"
    "{% elif message['role'] in ('system', 'developer') %}"
    "{{ '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' }}"
    "{% else %}{{ '<|start|>' + message['role'] + '<|message|>' + message['content'] + '<|end|>' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start|>assistant' }}{% endif %}"
)
WINDOW = 16


def build_micro_gpt_oss(folder: str | os.PathLike[str]) -> None:
    """Writes the model and its character-level tokenizer to ``folder``: 4 layers, 4 experts of which 2 are taken.

    Float32. Sinks and matrices are large enough for context, window and routing to matter.
    """
    import torch
    from transformers import GenerationConfig, GptOssConfig, GptOssForCausalLM

    tokenizer = build_tokenizer()
    ends = [tokenizer.convert_tokens_to_ids(token) for token in ("<|return|>", "<|endoftext|>", "<|call|>")]
    config = GptOssConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_local_experts=4, num_experts_per_tok=2, sliding_window=WINDOW,
        max_position_embeddings=2048, eos_token_id=ends[0], pad_token_id=ends[1], dtype="float32",
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0}, attention_dropout=0.0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model = GptOssForCausalLM(config).to(torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            noise = torch.randn(parameter.shape, generator=generator, device="cpu")
            if "layernorm" in name or name == "model.norm.weight":
                parameter.fill_(1.0)
            elif parameter.dim() == 1 or name.endswith("_bias"):
                parameter.copy_(0.3 * noise)
            else:  # experts are (expert, in, out), all else (out, in)
                parameter.copy_(noise * parameter.shape[1] ** -0.5)
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=ends[1])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character of printable ASCII and newline, and the special tokens of harmony."""
    others = [token for token in SPECIAL_TOKENS[2:] if token != "<|return|>"]
    return character_tokenizer(
        SPECIAL_TOKENS,
        CHAT_TEMPLATE,
        eos_token="<|return|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=others,
    )
