"""The policy: a causal language model that reads packed rows and answers with token log-probabilities."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gspo_lightning.packing import PackedBatch, SharedPrefixLayout, least_common_on, linear_logprobs
from gspo_lightning.packing.products import product_dtype, rows_missing
from gspo_lightning.policy.attention import layout_mask
from gspo_lightning.policy.padded import padded_logprobs
from gspo_lightning.policy.tied import tied_weight
from gspo_lightning.policy.vision import Vision
from gspo_lightning.types import Prompt


def without_adapter(model: Any) -> PreTrainedModel:
    """The transformers model inside one of peft; another as it is."""
    base: PreTrainedModel = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base


class Policy(nn.Module):
    """A transformers model (with or without a LoRA adapter), its tokenizer, and the two forwards we need.

    ``forward`` gives log-probabilities of a packed micro-batch; ``hidden_states`` is the body alone, for rollouts.

    Args:
        model: the model, or the peft model around it.
        tokenizer: its tokenizer.
        has_vision: whether the model reads images: see `gspo_lightning.policy.vision`.
        processor: image processor, for models that read images; saved with an export.
        is_padded: run every forward and all decoding by the model itself: see `gspo_lightning.policy.padded`.
        features_from: a policy with the same frozen vision tower, such as the one this is the reference of.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        *,
        has_vision: bool = False,
        processor: Any = None,
        is_padded: bool = False,
        features_from: Policy | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.tokenizer = tokenizer
        self.is_padded = is_padded
        self.caches_are_exact = True  # `gspo_lightning.rollout.check` looks
        self.shards: Any = None  # `gspo_lightning.distributed.sharding.Shards` once the weights are split over ranks
        self.processor = processor
        # Searched once: a rollout needs them at every token.
        modules: list[Any] = list(self.base_model.modules())
        self._recomputing = [m for m in modules if getattr(m, "gradient_checkpointing", False)]
        shared = features_from.vision if features_from is not None else None
        if shared is not None and not shared.is_frozen:
            shared = None
        self.vision: Vision | None = Vision(self.base_model, cache_from=shared) if has_vision else None

    @property
    def base_model(self) -> PreTrainedModel:
        """The transformers model inside the adapter, if there is one."""
        return without_adapter(self.model)

    @property
    def has_adapter(self) -> bool:
        """Whether the model is one of peft around it."""
        return self.base_model is not self.model

    @property
    def body(self) -> nn.Module:
        """The language layers without the output embedding."""
        body: Any = self.base_model.model if self.vision is None else self.vision.language_model
        return body

    @property
    def config(self) -> Any:
        return self.base_model.config

    @property
    def device(self) -> torch.device:
        return self.output_weight.device

    @property
    def least_common(self) -> int:
        """The fewest tokens in common that prompts of a row share; padded rows share none."""
        return sys.maxsize if self.is_padded else least_common_on(self.device)

    @property
    def output_weight(self) -> Tensor:
        """``(V, H)`` weight of the output embedding."""
        return self.base_model.get_output_embeddings().weight

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a completion: the generation config's (one or several) and the tokenizer's."""
        ids = self.base_model.generation_config.eos_token_id if self.base_model.generation_config else None
        found = ids if isinstance(ids, list) else [] if ids is None else [ids]
        own = self.tokenizer.eos_token_id
        return tuple(dict.fromkeys([*found, *([] if own is None else [own])]))

    def hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, layout: Any, prompts: Sequence[Prompt] = (), **kwargs: Any
    ) -> Tensor:
        """Last hidden states ``(rows, tokens, H)`` of a forward whose attention follows ``layout``.

        ``prompts`` are those of a packed row, for their vision inputs; a forward of single tokens has none.
        """
        return self._hidden_states(input_ids, position_ids, layout, prompts, **kwargs)

    # Separate, because under FSDP2 both `hidden_states` and `forward` are entry points that gather weights.
    def _hidden_states(
        self, input_ids: Tensor, position_ids: Tensor, layout: Any, prompts: Sequence[Prompt] = (), **kwargs: Any
    ) -> Tensor:
        caching = self._caching() if "past_key_values" in kwargs else nullcontext()
        tokens = input_ids.shape[1]
        with caching:
            output = self.body(
                **self._inputs(input_ids, position_ids, layout, prompts),
                attention_mask=layout_mask(input_ids.device),
                layout=layout,
                use_cache="past_key_values" in kwargs,
                **kwargs,
            )
        return output.last_hidden_state[:, :tokens]

    def _inputs(
        self, input_ids: Tensor, position_ids: Tensor, layout: Any, prompts: Sequence[Prompt]
    ) -> dict[str, Tensor]:
        """What the body reads of a row: with images as the architecture has it, else filled up to a usual length."""
        if self.vision is not None and prompts:
            # Not filled up: each architecture has other inputs that would have to be padded too.
            return self.vision.inputs(input_ids, layout, prompts)
        is_row = isinstance(layout, SharedPrefixLayout)
        missing = rows_missing(input_ids.shape[1], input_ids.device, product_dtype(self.output_weight)) if is_row else 0
        if missing:
            input_ids, position_ids = pad(input_ids, (0, missing)), pad(position_ids, (0, missing))
        return {"input_ids": input_ids, "position_ids": position_ids}

    def logits(self, hidden: Tensor) -> Tensor:
        """``(rows, H)`` last hidden states -> ``(rows, V)``, in the dtype of the products; for sampling."""
        return nn.functional.linear(hidden, self.output_weight)

    @contextmanager
    def _caching(self) -> Iterator[None]:
        """Switches recomputation off: transformers' layers silently drop a cache with it, gradient or not."""
        for module in self._recomputing:
            module.gradient_checkpointing = False
        try:
            yield
        finally:
            for module in self._recomputing:
                module.gradient_checkpointing = True

    def last_positions(self, prompts: Sequence[Prompt]) -> Tensor:
        """``(B,)``: the position after which each prompt's completions begin."""
        if self.vision is None:
            return torch.tensor([len(prompt.input_ids) - 1 for prompt in prompts], device=self.device)
        starts = [int(self.vision.prompt_positions(prompt)[0, -1]) - 1 for prompt in prompts]
        return torch.tensor(starts, device=self.device)

    def forward(
        self, packed: PackedBatch, temperature: float = 1.0, with_entropy: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities ``(L,)`` of the packed completion tokens at ``temperature``, and entropies ``(L,)``.

        Entropies are zeros unless ``with_entropy``. Float32, or float64 for a float64 model.
        """
        if self.is_padded:
            logprobs, entropy = padded_logprobs(self.base_model, packed, temperature, with_entropy)
            if self.vision is not None and not any(prompt.mm_inputs for prompt in packed.prompts):
                logprobs = logprobs + self.vision.nothing(logprobs)
            return logprobs, entropy
        with tied_weight(self.base_model.get_input_embeddings(), self.output_weight) as head:
            hidden = self._hidden_states(packed.input_ids, packed.position_ids, packed.layout, packed.prompts)[0]
        # The end of a prompt predicts for all its completions, so a backward adds gradients. The order is not fixed for
        # `index_select` on a GPU and for indexing on a CPU; a resumed run would not be bit-identical.
        at = packed.predictor_index
        return linear_logprobs(
            hidden[at] if hidden.is_cuda else hidden.index_select(0, at),
            head,
            packed.target_ids,
            temperature=temperature,
            with_entropy=with_entropy,
        )

    @property
    def samples_padded(self) -> bool:
        """Whether the model's own ``generate`` samples: it runs padded, or our caches are not exact for it."""
        return self.is_padded or not self.caches_are_exact

    def fall_back(self) -> None:
        """Runs padded from now on, with an attention that knows everything the architecture does."""
        self.is_padded = True
        self.base_model.set_attn_implementation("eager")

    @contextmanager
    def adapter_disabled(self) -> Iterator[None]:
        """The model without its adapter: the reference policy of a LoRA run, at no memory."""
        parameters = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with self.model.disable_adapter():  # type: ignore[operator]
                yield
        finally:
            # peft now trains all of its adapters, those on routers too, which `add_lora` has frozen.
            for parameter, trains in parameters:
                if parameter.requires_grad != trains:
                    parameter.requires_grad_(trains)
