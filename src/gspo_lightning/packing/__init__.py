"""Shared-prefix packing: the layout, its attention, the micro-batch plan, and log-probabilities from hidden states."""

from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.batch import PackedBatch, common_prefix, least_common_on, pack
from gspo_lightning.packing.layout import GroupLayout, SharedPrefixLayout
from gspo_lightning.packing.logprobs import linear_logprobs, logits_logprobs
from gspo_lightning.packing.plan import GroupSlice, MicroBatchPlan, plan_micro_batches

__all__ = [
    "GroupLayout",
    "GroupSlice",
    "MicroBatchPlan",
    "PackedBatch",
    "SharedPrefixLayout",
    "common_prefix",
    "least_common_on",
    "linear_logprobs",
    "logits_logprobs",
    "pack",
    "plan_micro_batches",
    "shared_prefix_attention",
]
