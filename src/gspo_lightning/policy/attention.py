"""Registers the project's attention with transformers, under one name for packed rows, decoding and plain batches.

A forward that packs or decodes passes ``layout=`` (an object with an ``attend`` method) and a 4-d placeholder as
attention mask, which transformers hands through untouched. A forward without a layout is ordinary causal
attention, so ``generate`` and padded batches of the same model keep working.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from gspo_lightning.packing.attention import attend, repeat_heads, shared_prefix_attention
from gspo_lightning.packing.flash import can_flash, flash_shared_prefix_attention
from gspo_lightning.packing.flex import can_flex, flex_shared_prefix_attention
from gspo_lightning.packing.layout import SharedPrefixLayout
from gspo_lightning.packing.products import product_dtype

ATTENTION_NAME = "gspo_shared_prefix"

AttentionForm = Literal["auto", "sdpa", "flex"]
"""Attention of a packed row: block by block with torch's fused kernels (``sdpa``), in one block-sparse kernel that is
compiled first (``flex``), or as suits device and model (``auto``): on a GPU, FlashAttention in bfloat16 or float16
without windows and sinks, else ``flex`` if it can be compiled."""


def attention_name(form: AttentionForm) -> str:
    """Name of a form in transformers, which gives a meaning of its own to names that contain ``sdpa`` or ``flex``."""
    return {"auto": ATTENTION_NAME, "sdpa": f"{ATTENTION_NAME}_blocks", "flex": f"{ATTENTION_NAME}_kernel"}[form]


def attention_implementation(form: AttentionForm, has_vision: bool) -> Any:
    """transformers' ``attn_implementation`` for a packed model; a vision tower keeps its own: it reads patches."""
    name = attention_name(form)
    return {"": name, "text_config": name, "vision_config": "sdpa"} if has_vision else name


class AttentionLayout(Protocol):
    """Anything that computes which tokens of a forward attend to each other."""

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, *, scaling: float, window: int | None, sinks: Tensor | None
    ) -> Tensor:
        """``(rows, heads, tokens, D)`` in and out; keys and values with ``kv_heads``."""
        ...


@torch.compiler.disable  # under model.compile, layouts differ from row to row
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    layout: SharedPrefixLayout | AttentionLayout | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    softcap: float | None = None,
    form: AttentionForm = "auto",
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function transformers calls; returns ``(rows, tokens, heads, D)`` and no weights."""
    if layout is None:
        if softcap is not None:
            raise NotImplementedError("soft-capped scores need attn_implementation=eager")
        if s_aux is not None:
            return _with_sinks(query, key, value, attention_mask, scaling, s_aux), None
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
    if dropout or softcap is not None:
        raise NotImplementedError("dropout and soft-capped scores are not part of the shared-prefix attention")
    if value.shape[-1] != query.shape[-1]:
        raise NotImplementedError("values of another size than queries are not part of the shared-prefix attention")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if isinstance(layout, SharedPrefixLayout):
        # Once per row, not once per block.
        query, key, value = (x.to(product_dtype(x)) for x in (query, key, value))
        attention = shared_prefix_attention
        if form == "auto" and can_flash(query, sliding_window, s_aux):
            attention = flash_shared_prefix_attention
        elif form == "flex" or (form == "auto" and layout.may_compile and can_flex(query)):
            attention = flex_shared_prefix_attention
        out = attention(query, key, value, layout, scaling=scale, window=sliding_window, sinks=s_aux)
    else:
        out = layout.attend(query, key, value, scaling=scale, window=sliding_window, sinks=s_aux)
    return out.transpose(1, 2), None


def _with_sinks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float | None, sinks: Tensor
) -> Tensor:
    """Attention of padded rows with sinks; without a mask, causal. Returns ``(rows, tokens, heads, D)``."""
    if mask is None:
        queries, keys = query.shape[2], key.shape[2]
        mask = torch.ones(queries, keys, dtype=torch.bool, device=query.device).tril(keys - queries)
    key, value = repeat_heads(key, query.shape[1]), repeat_heads(value, query.shape[1])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return attend(query, key, value, mask, scaling=scale, sinks=sinks).transpose(1, 2)


def register() -> None:
    """Makes the names of all forms known to transformers; calling it again changes nothing.

    cuDNN's attention, which torch prefers on recent GPUs, is switched off: it plans again for every shape, and every
    decoding step has its own. It stays off, because recomputed layers choose a kernel again in the backward, and what
    another kernel kept would not fit.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
    for form in get_args(AttentionForm):
        AttentionInterface.register(attention_name(form), functools.partial(attention_forward, form=form))
        AttentionMaskInterface.register(attention_name(form), sdpa_mask)


def layout_mask(device: torch.device) -> Tensor:
    """The 4-d placeholder that stops transformers from building a mask of its own."""
    return torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=device)
