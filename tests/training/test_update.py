"""One optimizer step is the equation, whatever the micro-batches, splits and shortcuts."""

from __future__ import annotations

import functools
from dataclasses import replace
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from gspo_lightning.config.hardware import busy_tokens, token_budget
from gspo_lightning.errors import NonFiniteGradientError
from gspo_lightning.objective import LOSSES, Objective
from gspo_lightning.policy.bundled import resolve_model
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.training import rollout_update
from gspo_lightning.training.run_state import restore_run_state, run_state
from gspo_lightning.training.update import UpdateSettings, build_micro_batch, minibatch_order, split_minibatches
from gspo_lightning.types import Completion, ScoredRollout
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, update_of, weights
from tests.support import flat_gradient, make_prompt, micro_policy, padded_logprobs, relative_distance

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def by_hand(folder, prompts, settings):
    """The gradient of the first step from padded rows and the policy-gradient form (ratio 1, nothing clipped)."""
    policy = micro_policy(folder)
    groups = [(p.input_ids, [c.token_ids for c in p.sample["completions"]]) for p in prompts]
    logprobs, _ = padded_logprobs(policy.base_model, groups)
    loss, start = torch.zeros((), dtype=torch.float64), 0
    count = sum(len(completions) for _, completions in groups)
    for prompt, (_, completions) in zip(prompts, groups, strict=True):
        rewards = torch.tensor([r for _, r in prompt.sample["scripted"]], dtype=torch.float64)
        spread = rewards.std() + 1e-4
        for reward, completion in zip(rewards, completions, strict=True):
            advantage = 0.0 if rewards.max() == rewards.min() else (reward - rewards.mean()) / spread
            end = start + len(completion)
            loss = loss - advantage * logprobs[start:end].mean() / count
            start = end
    loss.backward()
    return flat_gradient(policy)


def test_the_first_step_equals_the_policy_gradient_computed_from_padded_rows(micro_model_dir):
    ours, _ = update_of(micro_model_dir, Settings())
    assert relative_distance(ours, by_hand(micro_model_dir, scripted_prompts(), Settings())) < 1e-12


@pytest.mark.parametrize("budget", [1, 14, 25, 40, 10_000])
@pytest.mark.parametrize("kind", ["grpo", "dr_grpo", "dapo", "luspo"])
def test_the_update_is_the_same_for_every_token_budget(budget, kind, micro_model_dir):
    """A budget of 1 puts every sequence into a micro-batch of its own, 14 and 25 split groups."""
    whole, _ = update_of(micro_model_dir, Settings(objective={"loss_type": kind}))
    ours, _ = update_of(
        micro_model_dir, Settings(objective={"loss_type": kind}, update={"max_tokens_per_microbatch": budget})
    )
    assert relative_distance(ours, whole) < 1e-12


@pytest.mark.parametrize(
    ("lengths", "budget"),
    [
        ((128, 16, 8), 1024),  # small groups: what keeps the device busy
        ((2048, 32, 8), 2304),  # the whole group: 2048 + 8 x 32
        ((2048, 2048, 8), 8192),  # four prompts long: a group in parts, prompts at most a quarter
        ((16, 4096, 8), 4112),  # never less than one sequence
    ],
)
def test_the_budget_that_auto_takes_keeps_groups_whole_behind_long_prompts(lengths, budget):
    assert token_budget(*lengths, busy=1024) == budget


@pytest.mark.parametrize(("gib", "tokens"), [((80, 80), 16384), ((40,), 16384), ((80, 24), 8192), ((), 16384)], ids=str)
def test_a_large_gpu_takes_more_tokens_and_the_smallest_decides(gib, tokens, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(gib))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d: SimpleNamespace(total_memory=gib[d] * 2**30))
    assert busy_tokens(on_gpu=True, narrow=True) == tokens


@pytest.mark.parametrize("kind", ["grpo", "dapo"])
def test_groups_of_zero_advantage_may_be_dropped_or_kept(kind, micro_model_dir):
    dropped, lean = update_of(micro_model_dir, Settings(objective={"loss_type": kind}))
    kept, full = update_of(
        micro_model_dir, Settings(objective={"loss_type": kind}, update={"keep_zero_advantage": True})
    )
    assert relative_distance(dropped, kept) < 1e-12
    assert lean.counts["train_tokens"] < full.counts["train_tokens"]


@pytest.mark.parametrize("more", [{}, {"objective": {"beta": 0.1}}], ids=["free", "with a KL term"])
def test_a_minibatch_without_signal_takes_no_step_whether_or_not_it_is_forwarded(more, micro_model_dir):
    """Momentum of the step before would move the weights by a gradient of zero."""
    prompts = scripted_prompts()
    adam = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    for prompt in prompts[2:]:
        prompt.sample["scripted"] = [(i, 0.3) for i, _ in prompt.sample["scripted"]]

    def after(keep):
        update = {"num_minibatches": 2, "num_iterations": 2, "keep_zero_advantage": keep}
        return update_of(micro_model_dir, Settings(optimizer=adam, update=update, **more), prompts)

    (dropped, lean), (kept, full) = after(False), after(True)
    steps = [(m.counts["optimizer_steps"], m.counts["skipped_steps"]) for m in (lean, full)]
    assert steps == ([(4, 0)] * 2 if more else [(2, 2)] * 2)
    assert relative_distance(kept, dropped) < 1e-12
    assert full.last_metrics["grad_norm"] == pytest.approx(lean.last_metrics["grad_norm"], rel=1e-9)


def test_a_step_without_signal_in_which_the_entropy_bonus_rests_moves_nothing(micro_model_dir):
    """Adaptive entropy control forwards all completions, whose gradient is zero where its bonus does not act."""
    prompts = scripted_prompts()
    adam = functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1)
    for prompt in prompts[2:]:
        prompt.sample["scripted"] = [(i, 0.3) for i, _ in prompt.sample["scripted"]]

    def after(**objective):
        update = {"num_minibatches": 2, "num_iterations": 2}
        return update_of(micro_model_dir, Settings(optimizer=adam, update=update, objective=objective), prompts)

    (plain, lean), (resting, full) = after(), after(entropy_target=1e-6, entropy_coef=0.5)
    steps = [(m.counts["optimizer_steps"], m.counts["skipped_steps"]) for m in (lean, full)]
    assert steps == [(2, 2), (2, 2)]
    assert relative_distance(resting, plain) < 1e-12
    _, acting = after(entropy_target=9.0, entropy_coef=0.5)  # in all steps but the first
    assert acting.counts["optimizer_steps"] >= 3


def squared(x):
    return -x.ratio * x.advantages + x.log_ratio.square()


def test_ranks_ask_each_other_as_often_whatever_each_finds_of_a_loss(micro_model_dir, monkeypatch):
    """One that draws at random may seem to have a gradient at advantage 0 on one rank alone."""
    asked = []
    monkeypatch.setattr(rollout_update, "global_max", lambda value, device: asked.append(value) or value)

    def times(loss):
        asked.clear()
        settings = Settings(objective={"loss_type": loss}, update={"num_minibatches": 2, "keep_zero_advantage": True})
        update_of(micro_model_dir, settings)
        return len(asked)

    assert times("grpo") == times(squared) == 4


def test_with_a_kl_term_no_group_is_dropped(micro_model_dir):
    _, module = update_of(micro_model_dir, Settings(objective={"beta": 0.1}))
    _, without = update_of(micro_model_dir, Settings())
    assert module.counts["train_tokens"] > without.counts["train_tokens"]


def test_the_ratio_is_bit_equal_to_one_through_a_real_pass_of_old_logprobs(micro_model_dir, monkeypatch):
    """With a learning rate of zero the second minibatch sees old log-probabilities from a pass of its own."""

    seen = []
    original = Objective.__call__

    def spy(self, logprobs, old_logprobs, *args, **kwargs):
        seen.append((logprobs.detach().clone(), old_logprobs.clone()))
        return original(self, logprobs, old_logprobs, *args, **kwargs)

    monkeypatch.setattr(Objective, "__call__", spy)
    frozen = functools.partial(torch.optim.SGD, lr=0.0)
    for dtype in ("float64", "float32"):
        seen.clear()
        update_of(
            micro_model_dir, Settings(optimizer=frozen, dtype=dtype, update={"num_minibatches": 2, "num_iterations": 2})
        )
        assert len(seen) == 4
        assert all(torch.equal(new, old) for new, old in seen)


def test_old_logprobs_are_those_of_the_weights_that_sampled(micro_model_dir, monkeypatch):
    """In every minibatch and iteration, however often the weights have moved since."""

    seen = {}
    original = Objective.__call__

    def spy(self, logprobs, old_logprobs, advantages, sequence_index, lengths, **kwargs):
        seen.setdefault(tuple(lengths.tolist()), []).append(old_logprobs.clone())
        return original(self, logprobs, old_logprobs, advantages, sequence_index, lengths, **kwargs)

    monkeypatch.setattr(Objective, "__call__", spy)
    prompts = scripted_prompts()
    update_of(micro_model_dir, Settings(update={"num_minibatches": 4, "num_iterations": 3}), prompts)
    policy = micro_policy(micro_model_dir)
    expected = {}
    for prompt in prompts:
        completions = [c.token_ids for c in prompt.sample["completions"]]
        with torch.no_grad():
            expected[tuple(map(len, completions))] = padded_logprobs(
                policy.base_model, [(prompt.input_ids, completions)]
            )[0]
    assert len(seen) == 3  # four prompts, one without signal
    for lengths, values in seen.items():
        assert len(values) == 3
        for value in values:
            assert relative_distance(value, expected[lengths]) < 1e-12


def test_lora_reference_is_the_model_without_its_adapter(micro_model_dir, monkeypatch):
    seen = []
    original = Objective.__call__

    def spy(self, logprobs, old_logprobs, *args, ref_logprobs=None, **kwargs):
        seen.append((logprobs.detach(), ref_logprobs))
        return original(self, logprobs, old_logprobs, *args, ref_logprobs=ref_logprobs, **kwargs)

    monkeypatch.setattr(Objective, "__call__", spy)
    settings = Settings(
        objective={"beta": 0.1},
        lora=LoraSettings(r=4),
        rollouts=2,
        optimizer=functools.partial(torch.optim.SGD, lr=50.0),
    )
    _, module = update_of(micro_model_dir, settings)
    (first, ref_first), (second, ref_second) = seen
    assert relative_distance(first, ref_first) < 1e-12  # a fresh adapter is the identity
    # Training the adapter leaves the reference alone (the order of the prompts differs from rollout to rollout).
    assert relative_distance(ref_first.sort().values, ref_second.sort().values) < 1e-12
    assert relative_distance(second, ref_second) > 1e-6
    base = {n: p for n, p in module.policy.named_parameters() if not p.requires_grad}
    fresh = dict(micro_policy(micro_model_dir).named_parameters())
    for name, parameter in base.items():
        assert torch.equal(
            parameter, fresh[name.replace("model.base_model.model.", "model.").replace(".base_layer", "")]
        )


def test_full_reference_is_a_frozen_copy_outside_the_checkpoint(micro_model_dir):
    settings = Settings(objective={"beta": 0.1})
    _, module = update_of(micro_model_dir, settings)
    assert module.references and all(not p.requires_grad for p in module.references[0].parameters())
    assert len(module.state_dict()) == len(micro_policy(micro_model_dir).state_dict())
    assert torch.equal(
        torch.cat([p.flatten() for p in module.references[0].parameters()]),
        torch.cat([p.flatten() for p in micro_policy(micro_model_dir).parameters()]),
    )


def test_truncated_completions_leave_numerator_and_denominator(micro_model_dir):
    prompts = scripted_prompts()
    for prompt in prompts:
        c = prompt.sample["completions"][0]
        prompt.sample["completions"][0] = Completion(c.token_ids, c.text, c.sampler_logprobs, "length")
    masked, _ = update_of(micro_model_dir, Settings(objective={"mask_truncated_completions": True}), prompts)
    plain, _ = update_of(micro_model_dir, Settings(), prompts)
    policy = micro_policy(micro_model_dir)
    groups = [(p.input_ids, [c.token_ids for c in p.sample["completions"]]) for p in prompts]
    logprobs, _ = padded_logprobs(policy.base_model, groups)
    loss, start = 0.0, 0
    for number, (prompt, (_, completions)) in enumerate(zip(prompts, groups, strict=True)):
        rewards = torch.tensor([r for _, r in prompt.sample["scripted"]], dtype=torch.float64)
        for g, completion in enumerate(completions):
            end = start + len(completion)
            if g > 0 and number != 1:
                advantage = (rewards[g] - rewards.mean()) / (rewards.std() + 1e-4)
                loss = loss - advantage * logprobs[start:end].mean() / 8  # 4 prompts x 2 whole completions
            start = end
    loss.backward()
    assert relative_distance(masked, flat_gradient(policy)) < 1e-12
    assert relative_distance(masked, plain) > 1e-2


def test_a_rollout_without_signal_takes_no_optimizer_step(micro_model_dir, recwarn):
    prompts = scripted_prompts()
    for prompt in prompts:
        prompt.sample["scripted"] = [(i, 0.3) for i, _ in prompt.sample["scripted"]]
    adam = functools.partial(torch.optim.AdamW, lr=0.1, weight_decay=0.5)
    change, module = update_of(micro_model_dir, Settings(optimizer=adam, update={"num_minibatches": 2}), prompts)
    assert change.abs().max() == 0
    assert module.counts["skipped_steps"] == 2
    assert module.counts["optimizer_steps"] == 0
    assert module.counts["train_tokens"] == 0
    assert not [str(w.message) for w in recwarn if "lr_scheduler.step" in str(w.message)]  # the schedule goes on


def test_a_nonfinite_gradient_never_reaches_the_weights_and_ends_the_run_after_a_while(micro_model_dir, monkeypatch):
    original = Objective.__call__

    def poison(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        return replace(result, loss=result.loss * float("nan"))

    monkeypatch.setattr(Objective, "__call__", poison)
    change, module = update_of(micro_model_dir, Settings(update={"num_minibatches": 2}))
    assert change.abs().max() == 0
    assert module.counts["nonfinite_steps"] == 2
    with pytest.raises(NonFiniteGradientError, match=r"3 optimizer steps in a row .* Lower optimizer.lr"):
        update_of(micro_model_dir, Settings(update={"num_minibatches": 2}, rollouts=2))


def test_a_run_that_was_cut_gives_up_after_as_many_nonfinite_steps(micro_model_dir, monkeypatch):
    _, good = update_of(micro_model_dir, Settings())
    original = Objective.__call__
    monkeypatch.setattr(
        Objective, "__call__", lambda self, *a, **k: replace(r := original(self, *a, **k), loss=r.loss * float("nan"))
    )
    _, cut = update_of(micro_model_dir, Settings(update={"num_minibatches": 2}))
    assert cut.guarded_step.nonfinite_in_a_row == 2
    resumed = build_module(micro_model_dir, Settings(update={"num_minibatches": 2}, rollouts=2))
    restore_run_state(resumed, run_state(cut))
    with pytest.raises(NonFiniteGradientError, match="3 optimizer steps in a row"):
        trainer().fit(resumed, Batches(scripted_prompts(), 2).loader())
    restore_run_state(resumed, run_state(good))
    assert resumed.guarded_step.nonfinite_in_a_row == 0


def test_under_bfloat16_autocast_every_step_sees_the_new_weights(micro_model_dir):
    """training_step is one autocast region; its cached casts must not outlive an optimizer step."""
    from tests.scripted import Batches, build_module

    ratios = []
    original = Objective.__call__

    def spy(self, logprobs, old_logprobs, *args, **kwargs):
        ratios.append((logprobs - old_logprobs).detach().abs().max().item())
        return original(self, logprobs, old_logprobs, *args, **kwargs)

    settings = Settings(
        dtype="float32", update={"num_iterations": 2}, optimizer=functools.partial(torch.optim.SGD, lr=0.5)
    )
    module = build_module(micro_model_dir, settings)
    module.configure_model()
    before = weights(module)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Objective, "__call__", spy)
        trainer(precision="bf16-mixed").fit(module, Batches(scripted_prompts()).loader())
    assert (before - weights(module)).abs().max() > 0
    assert ratios[0] == 0
    assert ratios[1] > 1e-3


@pytest.mark.parametrize("kind", list(LOSSES))
def test_every_loss_takes_a_finite_step_that_raises_good_and_lowers_bad_completions(kind, micro_model_dir):
    level = LEVELS_OF[kind][0]
    settings = Settings(
        objective={"loss_type": kind, "importance_sampling_level": level},
        optimizer=functools.partial(torch.optim.SGD, lr=0.05),
    )
    prompts = scripted_prompts()
    change, module = update_of(micro_model_dir, settings, prompts)
    assert torch.isfinite(change).all() and change.abs().max() > 0
    groups = [(p.input_ids, [c.token_ids for c in p.sample["completions"]]) for p in prompts]
    with torch.no_grad():
        new, _ = padded_logprobs(module.policy.base_model, groups)
        old, _ = padded_logprobs(micro_policy(micro_model_dir).base_model, groups)
    gain, start = 0.0, 0
    for b, (_, completions) in enumerate(groups):
        for g, completion in enumerate(completions):
            end = start + len(completion)
            gain += (module.last_scored.advantages[b, g] * (new - old)[start:end].mean()).item()
            start = end
    assert gain > 0


def test_a_prompts_minibatch_does_not_depend_on_how_many_ranks_there_are():
    """24 prompts in 3 minibatches: every three in a row give one to each, on 1, 2, 4 or 8 ranks."""

    def membership(ranks: int) -> dict[int, int]:
        share, found = 24 // ranks, {}
        for rank in range(ranks):
            order = minibatch_order(share, 3, seed=5, first=rank * share)
            size = share // 3
            found |= {rank * share + prompt: place // size for place, prompt in enumerate(order)}
        return found

    whole = membership(1)
    assert sorted(whole) == list(range(24))
    assert all({whole[start], whole[start + 1], whole[start + 2]} == {0, 1, 2} for start in range(0, 24, 3))
    assert membership(2) == membership(4) == membership(8) == whole
    assert len({tuple(minibatch_order(24, 3, seed, 0)) for seed in range(20)}) == 20


def test_minibatches_partition_the_prompts_in_the_given_order(micro_model_dir):
    _, module = update_of(micro_model_dir, Settings())
    minibatches = split_minibatches(
        module.last_scored,
        UpdateSettings(num_minibatches=2),
        zero_advantage_is_free=True,
        mask_truncated=False,
        order=[2, 0, 3, 1],
        least_common=16,
    )
    assert [m.groups for m in minibatches] == [(2, 0), (3, 1)]
    assert {part.group for m in minibatches for plan in m.plan for part in plan} == {0, 2, 3}
    assert [m.num_sequences for m in minibatches] == [6, 6]


def test_what_the_prompts_of_a_minibatch_begin_with_counts_once_in_the_budget():
    """Three groups of 20 + 4 prompt tokens and twice 3 inputs: 20 + 3 x 10 = 50 in one row, of which 20 + 20 fit into 49."""
    prompts = [make_prompt(torch.cat([torch.arange(20), torch.arange(40 + n, 44 + n)])) for n in range(3)]
    prompts.append(make_prompt(torch.arange(50, 80)))  # begins with other tokens, but is silent and not forwarded
    completion = Completion(torch.arange(4), "", torch.zeros(4), "stop")
    rewards = torch.tensor([[1.0, -1.0]] * 3 + [[0.0, 0.0]], dtype=torch.float64)
    scored = ScoredRollout(prompts, [[completion] * 2] * 4, (), rewards[..., None], rewards, rewards)

    def tokens_of_rows(budget, least):
        settings = UpdateSettings(num_minibatches=1, max_tokens_per_microbatch=budget)
        kinds = {"zero_advantage_is_free": True, "mask_truncated": False, "least_common": least}
        (minibatch,) = split_minibatches(scored, settings, **kinds, order=[0, 1, 2, 3])
        rows = [build_micro_batch(scored, plan, torch.device("cpu"), least).packed for plan in minibatch.plan]
        return sorted(row.num_tokens for row in rows)

    assert tokens_of_rows(50, 20) == [50]
    assert tokens_of_rows(49, 20) == [24 + 6, 20 + 20]
    # Where so few are forwarded with every prompt, as on a GPU, they are planned so: 30 each.
    assert tokens_of_rows(89, 21) == [30, 60]


@pytest.mark.parametrize("budget", [1, 14, 25])
@pytest.mark.parametrize("keep", [False, True])
def test_top_entropy_tokens_are_chosen_over_the_minibatch_not_the_micro_batch(budget, keep, micro_model_dir):
    """The choice is global and among tokens with a gradient, so neither the plan nor the dropping changes it."""
    level = {"importance_sampling_level": "sequence_token"}
    chosen = {"top_entropy_quantile": 0.3, **level}
    whole, module = update_of(micro_model_dir, Settings(objective=chosen))
    everything, _ = update_of(micro_model_dir, Settings(objective=level))
    ours, _ = update_of(
        micro_model_dir,
        Settings(objective=chosen, update={"max_tokens_per_microbatch": budget, "keep_zero_advantage": keep}),
    )
    assert relative_distance(ours, whole) < 1e-12
    assert relative_distance(whole, everything) > 0.1
    assert 0.3 <= module.last_metrics["selected_frac"] < 0.4


def test_the_reference_moves_towards_the_policy_by_the_given_share(micro_model_dir):
    start = micro_policy(micro_model_dir)
    _, module = update_of(
        micro_model_dir,
        Settings(
            objective={"beta": 0.1}, update={"ref_sync_every_n_rollouts": 2, "ref_model_mixup_alpha": 0.25}, rollouts=3
        ),
    )
    # One sync, after rollout 2: replay the run up to there for the policy of that moment.
    _, then = update_of(micro_model_dir, Settings(objective={"beta": 0.1}, rollouts=2))
    for reference, first, policy in zip(
        module.references[0].parameters(), start.parameters(), then.policy.parameters(), strict=True
    ):
        assert torch.allclose(reference, 0.75 * first + 0.25 * policy, rtol=1e-12, atol=1e-14)


def test_beta_end_weighs_the_kl_of_each_rollout_by_its_place_in_the_run(micro_model_dir):
    """At the first step policy and reference are the same and the KL's gradient is zero, so of two rollouts the second
    alone decides: its beta is that of the end; of three, the second one's is the mean of both ends."""
    settings = {"beta": 0.5, "beta_end": 0.1}
    ended, _ = update_of(micro_model_dir, Settings(objective=settings, rollouts=2))
    constant, _ = update_of(micro_model_dir, Settings(objective={"beta": 0.1}, rollouts=2))
    other, _ = update_of(micro_model_dir, Settings(objective={"beta": 0.5}, rollouts=2))
    assert relative_distance(ended, constant) < 1e-12
    assert relative_distance(other, constant) > 1e-3

    class Second(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            if pl_module.rollouts_done == 2:
                self.weights = weights(pl_module)

    second = Second()
    update_of(micro_model_dir, Settings(objective=settings, rollouts=3), callbacks=[second])
    halfway, module = update_of(micro_model_dir, Settings(objective={"beta": 0.3}, rollouts=2))
    start = weights(module) + halfway
    assert relative_distance(start - second.weights, halfway) < 1e-12


def test_quantiles_of_the_ratio_are_those_of_all_sequences(micro_model_dir, monkeypatch):
    seen = []
    original = Objective.__call__

    def spy(self, *args, **kwargs):
        result = original(self, *args, **kwargs)
        seen.append(result.ratio)
        return result

    monkeypatch.setattr(Objective, "__call__", spy)
    _, module = update_of(micro_model_dir, Settings(update={"num_minibatches": 2, "max_tokens_per_microbatch": 14}))
    ratios = sorted(torch.cat(seen).tolist())
    position = 0.99 * (len(ratios) - 1)
    low = int(position)
    expected = ratios[low] + (position - low) * (ratios[min(low + 1, len(ratios) - 1)] - ratios[low])
    assert module.last_metrics["ratio/p99"] == pytest.approx(expected, rel=1e-12)
    assert module.last_metrics["ratio/p50"] == pytest.approx(
        torch.tensor(ratios).double().quantile(0.5).item(), rel=1e-12
    )


def test_quantiles_of_more_ratios_than_torch_counts():
    from gspo_lightning.training.rollout_log import quantiles

    values = torch.arange(2**24 + 1).flip(0)  # one more than torch.quantile takes
    assert quantiles(values, [0.0, 0.25, 1.0]) == {0.0: 0, 0.25: 2**22, 1.0: 2**24}
    assert quantiles(torch.tensor([3.0, 1.0]), [0.25]) == {0.25: 1.5}


LEVELS_OF = {name: spec.levels or ("token",) for name, spec in LOSSES.items()}


@given(data=st.data())
@hypothesis_settings(max_examples=25, deadline=None, derandomize=True)
def test_any_loss_at_any_level_gives_the_same_update_for_any_plan_and_order(data):
    """Loss, level, extra terms, token budget and the order of prompts are drawn; nothing but the first two may matter."""
    loss = data.draw(st.sampled_from(sorted(LOSSES)))
    level = data.draw(st.sampled_from(LEVELS_OF[loss]))
    one_loss = Objective(8, importance_sampling_level=level, loss_type=loss).shares_one_loss  # no token can be left out
    objective = {
        "loss_type": loss,
        "importance_sampling_level": level,
        "beta": data.draw(st.sampled_from([0.0, 0.1])),
        "entropy_coef": data.draw(st.sampled_from([0.0, 0.05])),
        "top_entropy_quantile": 1.0 if one_loss else data.draw(st.sampled_from([1.0, 0.4])),
        "mask_truncated_completions": data.draw(st.booleans()),
    }
    prompts = scripted_prompts(seed=data.draw(st.integers(0, 5)))
    budget = data.draw(st.integers(1, 80))
    folder = resolve_model("bundled:micro")
    shared = {"num_iterations": 2}
    whole, _ = update_of(folder, Settings(objective=objective, update=shared), prompts)
    shuffled = data.draw(st.permutations(prompts))
    ours, _ = update_of(
        folder, Settings(objective=objective, update={**shared, "max_tokens_per_microbatch": budget}), shuffled
    )
    assert (ours - whole).norm() <= 1e-12 * whole.norm() + 1e-14


def test_a_reference_that_has_moved_stays_where_it_is_when_a_resumed_run_no_longer_moves_it(micro_model_dir):
    moving = Settings(objective={"beta": 0.1}, update={"ref_sync_every_n_rollouts": 1}, rollouts=1)
    _, module = update_of(micro_model_dir, moving)
    checkpoint = {"gspo_lightning": run_state(module)}
    still = Settings(objective={"beta": 0.1}, rollouts=1)
    for _ in range(2):  # the second run goes on from a checkpoint of the first that no longer moves it
        _, resumed = update_of(micro_model_dir, still)
        restore_run_state(resumed, checkpoint["gspo_lightning"])
        for ours, moved in zip(resumed.references[0].parameters(), module.references[0].parameters(), strict=True):
            assert torch.equal(ours, moved)
        checkpoint = {"gspo_lightning": run_state(resumed)}
    start = micro_policy(micro_model_dir)
    assert not torch.equal(next(start.parameters()), next(module.references[0].parameters()))
