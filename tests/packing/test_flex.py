"""The one-kernel form of the shared-prefix attention gives what the block-by-block form gives."""

from __future__ import annotations

import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, pack
from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.flex import block_mask, flex_shared_prefix_attention
from gspo_lightning.policy.attention import attention_name
from tests.support import micro_policy, random_groups, relative_distance

LAYOUTS = {
    "ragged": (GroupLayout(6, (3, 0, 4, 2, 11, 2)), GroupLayout(5, ()), GroupLayout(1, (2,))),
    "several blocks of scores": (GroupLayout(200, (150, 3, 40)), GroupLayout(90, (7, 61))),
    "a common prefix": (GroupLayout(180, (50, 3, 40)), GroupLayout(153, (7, 61)), GroupLayout(151, ())),
}
COMMON = {"a common prefix": 150}


def layout_of(name: str) -> SharedPrefixLayout:
    return SharedPrefixLayout(LAYOUTS[name], torch.device("cpu"), COMMON.get(name, 0))


@pytest.mark.parametrize("window", [None, 4, 130])
@pytest.mark.parametrize("with_sinks", [False, True])
@pytest.mark.parametrize("name", LAYOUTS)
def test_one_kernel_equals_block_by_block_in_float64(name, window, with_sinks):
    layout = layout_of(name)
    tokens = layout.num_tokens
    # torch refuses gradients of this kernel on a CPU: tests/gpu has them.
    query = torch.randn(1, 4, tokens, 8, dtype=torch.float64)
    key, value = (torch.randn(1, 2, tokens, 8, dtype=torch.float64) for _ in range(2))
    sinks = torch.randn(4, dtype=torch.float64) if with_sinks else None
    flex = flex_shared_prefix_attention(query, key, value, layout, scaling=0.3, window=window, sinks=sinks)
    blocks = shared_prefix_attention(query, key, value, layout, scaling=0.3, window=window, sinks=sinks)
    assert relative_distance(flex, blocks) < 1e-12


@pytest.mark.parametrize("window", [None, 130])
@pytest.mark.parametrize("name", LAYOUTS)
def test_blocks_of_scores_are_those_torch_finds(name, window, monkeypatch):
    monkeypatch.setattr("gspo_lightning.packing.flex.ROWS_AT_A_TIME", 1)  # one row of blocks at a time
    ours = block_mask(layout_of(name), window)
    tokens = layout_of(name).num_tokens
    theirs = create_block_mask(ours.mask_mod, None, None, tokens, tokens, device="cpu")
    # Ours has two blocks at least, the second of which may lie behind the row and allow nothing.
    count = theirs.kv_num_blocks.shape[-1]
    assert torch.equal(ours.to_dense()[..., :count, :count], theirs.to_dense())
    assert not ours.to_dense()[..., count:, :].any() and not ours.to_dense()[..., count:].any()
    assert torch.equal(ours.full_kv_num_blocks[..., :count], theirs.full_kv_num_blocks)
    for row, count in enumerate(theirs.full_kv_num_blocks[0, 0].tolist()):
        assert set(ours.full_kv_indices[0, 0, row, :count].tolist()) == set(
            theirs.full_kv_indices[0, 0, row, :count].tolist()
        )
    assert torch.equal(ours.q_num_blocks[..., : theirs.q_num_blocks.shape[-1]], theirs.q_num_blocks)


def test_completions_of_one_group_share_no_block_that_only_they_would_need():
    layout = SharedPrefixLayout((GroupLayout(128, (128, 128, 128)),), torch.device("cpu"))
    # The prompt sees itself, each completion sees the prompt and itself: nothing else is computed.
    assert block_mask(layout, None).to_dense()[0, 0].int().tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 0, 1, 0],
        [1, 0, 0, 1],
    ]


def test_a_model_can_be_told_which_form_to_use(micro_model_dir, monkeypatch):
    calls = []

    def counted(*args, **kwargs):
        calls.append(1)
        return flex_shared_prefix_attention(*args, **kwargs)

    monkeypatch.setattr("gspo_lightning.policy.attention.flex_shared_prefix_attention", counted)
    groups = random_groups([(9, [4, 1, 6]), (2, [3])], 90)
    found, used = {}, {}
    for form in ("auto", "sdpa", "flex"):
        policy = micro_policy(micro_model_dir)
        policy.base_model.set_attn_implementation(attention_name(form))
        calls.clear()
        with torch.no_grad():
            found[form], _ = policy(pack(groups, torch.device("cpu")))
        used[form] = len(calls)
    assert used == {"auto": 0, "sdpa": 0, "flex": 2}  # layers; auto is block by block on a CPU
    assert relative_distance(found["flex"], found["sdpa"]) < 1e-12


def test_rows_of_all_lengths_and_windows_share_one_compiled_graph(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # Without Triton the graph is captured and run as it is: what is compiled anew is the same as on a GPU.
    captured = torch.compile(flex_attention, dynamic=True, backend="eager")
    monkeypatch.setattr("gspo_lightning.packing.flex.flex_attention", captured)
    graphs = []
    for prompt, completions, window in ((11, (4, 8, 1), None), (256, (127,) * 8, 5), (300, (), None), (128, (), 40)):
        common = prompt // 2 if window else 0
        layout = SharedPrefixLayout((GroupLayout(prompt, completions),) * 2, torch.device("cpu"), common)
        query, key, value = (torch.randn(1, heads, layout.num_tokens, 16) for heads in (4, 2, 2))
        flex_shared_prefix_attention(query, key, value, layout, scaling=0.25, window=window)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1, 1]
    torch._dynamo.reset()
