"""The micro-batch plan: every sequence once, within budget, from lengths alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gspo_lightning.packing import GroupSlice, plan_micro_batches


def tokens(plan, prompts, lengths, common=0):
    return common + sum(
        prompts[part.group] + sum(dict(lengths[part.group])[n] for n in part.completions) - common for part in plan
    )


@given(
    st.lists(st.tuples(st.integers(1, 40), st.lists(st.integers(0, 30), max_size=6)), min_size=1, max_size=8),
    st.integers(1, 120),
    st.integers(0, 50),
)
def test_every_sequence_appears_once_and_budgets_hold(groups, budget, common):
    prompts = [common + prompt for prompt, _ in groups]
    lengths = [list(enumerate(completions)) for _, completions in groups]
    plans = plan_micro_batches(prompts, lengths, budget, common)
    seen = [(part.group, number) for plan in plans for part in plan for number in part.completions]
    assert sorted(seen) == [(g, n) for g, (_, completions) in enumerate(groups) for n in range(len(completions))]
    for plan in plans:
        alone = len(plan) == 1 and len(plan[0].completions) == 1
        assert alone or tokens(plan, prompts, lengths, common) <= budget


def test_what_prompts_begin_with_counts_once_per_micro_batch():
    # 30 in common and 4 x (10 + 20) fit into 150, and into no less.
    groups = [40] * 4, [[(0, 20)]] * 4
    assert len(plan_micro_batches(*groups, 150, 30)) == 1
    assert len(plan_micro_batches(*groups, 149, 30)) == len(plan_micro_batches(*groups, 150)) == 2


def test_a_group_over_budget_is_split_and_others_fill_the_gaps():
    plans = plan_micro_batches([10, 2], [[(0, 5), (1, 5), (2, 5)], [(0, 3)]], 20)
    assert plans == [
        (GroupSlice(0, (0, 1)),),
        (GroupSlice(0, (2,)), GroupSlice(1, (0,))),
    ]


def test_micro_batches_are_as_few_as_first_fit_needs_and_evenly_filled():
    # First fit would put three of these four into the first.
    plans = plan_micro_batches([10] * 4, [[(0, 20)]] * 4, 100)
    assert [[part.group for part in plan] for plan in plans] == [[0, 2], [1, 3]]
    # The longest by turns to where the least is would make 36 and 48 of these; first fit keeps to the budget.
    lengths = [22, 20, 14, 14, 14]
    plans = plan_micro_batches([1] * 5, [[(0, n - 1)] for n in lengths], 42)
    assert sorted(sum(lengths[part.group] for part in plan) for plan in plans) == [42, 42]


def test_groups_without_survivors_are_left_out():
    assert plan_micro_batches([10, 2], [[], [(1, 3)]], 20) == [(GroupSlice(1, (1,)),)]
    assert plan_micro_batches([10], [[]], 20) == []
