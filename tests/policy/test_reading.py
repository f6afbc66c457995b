"""What stops a model from being loaded is told in one line."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from gspo_lightning.errors import UserError
from gspo_lightning.policy.load import PolicyLoader


def test_a_model_that_does_not_fit_on_the_gpu_is_not_called_broken(micro_model_dir, monkeypatch):
    def from_pretrained(*arguments, **settings):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    with pytest.raises(UserError) as error:
        PolicyLoader(str(micro_model_dir)).load()
    assert str(error.value) == (
        f"model.path={micro_model_dir}: out of memory while loading the model onto the GPU; take less of it (an "
        "adapter, lora=language, on model.dtype=bfloat16 or model.quantization=nf4), or split it over GPUs "
        "(trainer=fsdp)"
    )
