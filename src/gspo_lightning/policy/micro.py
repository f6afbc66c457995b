"""A language model small enough to train inside a unit test, built from nothing and without a network.

It leaves out everything that costs time (long context, large vocabulary, pretrained weights) and keeps
everything that causes bugs: grouped key/value heads, tied embeddings, a chat template, and a padding
token that is also the end of sequence.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.nn import Module
    from transformers import PreTrainedTokenizerFast

EOS_TOKEN = "<|im_end|>"
BOS_TOKEN = "<|im_start|>"
UNK_TOKEN = "<unk>"
SPECIAL_TOKENS = (UNK_TOKEN, BOS_TOKEN, EOS_TOKEN)
CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
_EMBEDDING_STD = 0.1


def build_micro_model(folder: str | os.PathLike[str], seed: int = 0, num_attention_heads: int = 4) -> None:
    """Write a random tiny Llama and a character-level tokenizer to ``folder``, in Hugging Face format.

    Two layers, hidden size 64, two query heads to a key/value head, intermediate size 128, tied
    embeddings, no dropout, float32, about 80 thousand parameters. The vocabulary is ``<unk>``,
    ``<|im_start|>``, ``<|im_end|>``, newline and printable ASCII; ``pad == eos`` on purpose. The same seed
    gives the same bytes of weights; torch's global random state is left as it was.

    Args:
        folder: created if missing.
        seed: seed of the weights.
        num_attention_heads: query heads; 2 gives heads of size 32, the least that vLLM takes.

    Raises:
        OSError: if ``folder`` cannot be written.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = build_micro_tokenizer()
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_attention_heads // 2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        attention_dropout=0.0,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS_TOKEN),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        model = LlamaForCausalLM(config).to(torch.float32)
    _initialise(model, seed)
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=[config.eos_token_id], pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_micro_tokenizer() -> PreTrainedTokenizerFast:
    """Build the character-level tokenizer of the micro model: one token per character, 99 in all.

    Characters outside printable ASCII and newline become ``<unk>``.
    """
    return character_tokenizer(
        SPECIAL_TOKENS, CHAT_TEMPLATE, bos_token=BOS_TOKEN, eos_token=EOS_TOKEN, pad_token=EOS_TOKEN
    )


def character_tokenizer(special: Sequence[str], chat_template: str, **kwargs: Any) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per character after the special ones, the first of which is ``<unk>``.

    Args:
        special: special tokens in the order of their ids.
        chat_template: a template as on the hub.
        kwargs: the roles of the special tokens, as `PreTrainedTokenizerFast` takes them.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*special, *CHARACTERS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNK_TOKEN))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token=UNK_TOKEN,
        chat_template=chat_template,
        clean_up_tokenization_spaces=False,
        model_max_length=2048,
        **kwargs,
    )


def _initialise(model: Module, seed: int) -> None:
    """Fill the parameters from ``seed`` alone, so that neither library defaults nor global state matter.

    Matrices keep the variance of their input (std ``1/sqrt(fan_in)``): with the usual 0.02 at this width the
    model ignores its context, and a test of attention or positions could not fail.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            std = _EMBEDDING_STD if "embed" in name else parameter.shape[1] ** -0.5
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32, device="cpu")
            parameter.copy_(noise * std)
