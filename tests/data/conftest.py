"""The micro tokenizer in a folder: one token per character, so that lengths can be counted by eye."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder that passes for a model as far as data is concerned: config and tokenizer, no weights."""
    from transformers import LlamaConfig

    from gspo_lightning.policy.micro import build_micro_tokenizer

    folder: Path = tmp_path_factory.mktemp("tokenizer")
    build_micro_tokenizer().save_pretrained(folder)
    LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(folder)
    (folder / "model.safetensors").touch()
    return str(folder)
