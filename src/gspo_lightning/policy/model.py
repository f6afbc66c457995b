"""The policy: a causal language model that reads packed rows and answers with token log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo_lightning.packing import PackedBatch, linear_logprobs
from gspo_lightning.policy.attention import layout_mask


class Policy(nn.Module):
    """A transformers model (with or without a LoRA adapter), its tokenizer, and the two forwards we need.

    ``forward`` gives log-probabilities of a packed micro-batch; ``hidden_states`` is the body alone, for rollouts.
    """

    def __init__(self, model: nn.Module, tokenizer: PreTrainedTokenizerBase, *, has_adapter: bool) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.has_adapter = has_adapter

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model inside the adapter, if there is one."""
        return self.model.get_base_model() if self.has_adapter else self.model  # type: ignore[operator]

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    @property
    def output_weight(self) -> Tensor:
        """``(V, H)`` of the output embedding."""
        return self.base_model.get_output_embeddings().weight

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion: the generation config's (one or several) and the tokenizer's."""
        ids = self.base_model.generation_config.eos_token_id if self.base_model.generation_config else None
        found = ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*found, *([] if own is None else [own])]))

    def hidden_states(self, input_ids: Tensor, position_ids: Tensor, layout: Any, **kwargs: Any) -> Tensor:
        """Last hidden states ``(rows, tokens, H)`` of a forward whose attention follows ``layout``."""
        output = self.base_model.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask=layout_mask(input_ids.device),
            layout=layout,
            use_cache=kwargs.get("past_key_values") is not None,
            **kwargs,
        )
        return output.last_hidden_state

    def forward(
        self, packed: PackedBatch, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(L,)`` of the packed completion tokens at ``temperature``, and entropies ``(L,)``.

        Entropies are zeros unless ``with_entropy``. Float32, or float64 for a float64 model.
        """
        hidden = self.hidden_states(packed.input_ids, packed.position_ids, packed.layout, **packed.mm_inputs)
        return linear_logprobs(
            hidden[0].index_select(0, packed.predictor_index),
            self.output_weight,
            packed.target_ids,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The model without its adapter: the reference policy of a LoRA run, at no memory."""
        with self.model.disable_adapter():  # type: ignore[operator]
            yield
