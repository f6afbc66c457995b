"""Parts of one's own in a Trainer of one's own: each that cannot be trained with is refused in one line."""

from __future__ import annotations

import contextlib
import copy
import math
import re
from dataclasses import replace

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.config import checks
from gspo_lightning.config.build import build_module as module_of
from gspo_lightning.errors import UserError
from gspo_lightning.objective import Objective
from gspo_lightning.objective.mismatch import MismatchCorrection
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.training.schedule import Schedule
from gspo_lightning.training.update import UpdateSettings
from gspo_lightning.training.validation import ValidationSettings
from gspo_lightning.types import PromptBatch, Rollout
from tests.conf.test_groups import resolved
from tests.scripted import Batches, ScriptedEngine, Settings, build_module, scripted_prompts, trainer, weights
from tests.support import padded_logprobs

TWO = {"num_minibatches": 2, "num_iterations": 2}

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def fit(module, batches=1, **changes):
    """Fits on the same batch again and again."""
    trainer(**changes).fit(module, Batches(scripted_prompts(), batches).loader())


def refused(module, line, **changes):
    """Asserts the whole line, and that nothing was trained."""
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        fit(module, **changes)
    assert module.rollouts_done == 0


# ---------------------------------------------------------------- the Trainer


def test_processes_that_take_the_trained_weights_away_are_refused(micro_model_dir):
    with pytest.raises(Exception, match=r"UserError: trainer.strategy: processes .* use strategy='ddp' in a script"):
        fit(build_module(micro_model_dir, Settings()), strategy="ddp_fork")


def test_steps_that_never_come_are_not_waited_for(micro_model_dir):
    line = (
        "trainer.min_steps=3: max_rollouts ends the run, and Lightning would wait for steps that never come; "
        "leave min_steps out"
    )
    refused(build_module(micro_model_dir, Settings(rollouts=2)), line, min_steps=3, max_epochs=5)


def test_epochs_behind_the_last_rollout_say_nothing(micro_model_dir, capsys):
    module = build_module(micro_model_dir, Settings(rollouts=2))
    fit(module, batches=2, min_epochs=4)
    assert module.rollouts_done == 2 and "nothing is trained" not in capsys.readouterr().out
    fit(module, batches=2, min_epochs=4)
    assert capsys.readouterr().out.count("2 of 2 rollouts are done, so nothing is trained") == 1


@pytest.mark.parametrize("count", [0, 3])
def test_a_loader_without_a_further_batch_ends_the_run_and_says_so(count, micro_model_dir):
    """A generator gives its batches once; Lightning goes on to begin epochs, here up to a thousand."""
    module, runner = build_module(micro_model_dir, Settings(rollouts=5)), trainer(max_epochs=1000)
    epochs = "0 and 1" if count == 0 else "1 and 2"
    line = f"train_dataloader: it gave no batch in epochs {epochs}, so the run ends after {count} of 5 rollouts"
    with pytest.warns(UserWarning, match=line):
        runner.fit(module, (PromptBatch(scripted_prompts()) for _ in range(count)))
    assert module.rollouts_done == count and runner.current_epoch == min(count, 1) + 2


def test_validation_names_its_own_loader(micro_model_dir):
    loader = DataLoader([scripted_prompts()], batch_size=None, collate_fn=lambda rows: {"rows": len(rows)})
    with pytest.raises(UserError, match="^val_dataloader: a batch is a dict, not a PromptBatch; give PromptBatch"):
        trainer(limit_val_batches=1).validate(build_module(micro_model_dir, Settings()), loader)


# ---------------------------------------------------------------- configure_optimizers


def sgd(module):
    return torch.optim.SGD(module.parameters(), lr=0.1)


def with_scheduler(module, make, **more):
    optimizer = sgd(module)
    return [optimizer], [{"scheduler": make(optimizer), **more}]


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5**step)


@pytest.mark.parametrize(
    ("configure", "line"),
    [
        (lambda module: None, "no optimizer of this module's parameters; return one of them"),
        (lambda module: [], "no optimizer of this module's parameters; return one of them"),
        (
            lambda module: torch.optim.LBFGS(module.parameters()),
            "LBFGS.step() needs closure, but a minibatch is one step without arguments; return one that needs none",
        ),
        (
            lambda module: with_scheduler(module, ReduceLROnPlateau),
            "ReduceLROnPlateau.step() needs metrics, but a minibatch is one step without arguments; return one that "
            "needs none",
        ),
        (
            lambda module: with_scheduler(module, halving, frequency=2, interval="step"),
            "frequency=2, but the scheduler steps once per minibatch; leave frequency out and count minibatches in "
            "the scheduler",
        ),
    ],
    ids=["none", "an empty list", "closure", "metrics", "frequency"],
)
def test_what_no_minibatch_could_step_is_refused(configure, line, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.configure_optimizers = lambda: configure(module)
    refused(module, f"configure_optimizers: {line}")


@pytest.mark.parametrize("interval", [{}, {"interval": "epoch"}, {"interval": "step"}])
def test_a_scheduler_steps_once_per_minibatch_whatever_its_interval(interval, micro_model_dir):
    """Two rollouts of two minibatches: 0.1 is halved four times."""
    module = build_module(micro_model_dir, Settings(rollouts=2, update={"num_minibatches": 2}))
    module.configure_optimizers = lambda: with_scheduler(module, halving, **interval)
    fit(module, batches=2)
    assert module.last_metrics["lr"] == pytest.approx(0.1 / 16)


# ---------------------------------------------------------------- engine, advantages, auxiliary loss


class Cutting(ScriptedEngine):
    def generate(self, policy, prompts, sampling, seed):
        rollout = super().generate(policy, prompts, sampling, seed)
        return self.cut(rollout)


class Single(Cutting):
    def cut(self, rollout):
        return Rollout(rollout.prompts, [group[:1] for group in rollout.completions])


class Ragged(Cutting):
    def cut(self, rollout):
        return Rollout(rollout.prompts, [*rollout.completions[:3], rollout.completions[3][:2]])


class Short(Cutting):
    def cut(self, rollout):
        return Rollout(rollout.prompts[:3], rollout.completions[:3])


@pytest.mark.parametrize(
    ("engine", "found"),
    [
        (Single, "4 prompts with [1, 1, 1, 1]"),
        (Ragged, "4 prompts with [3, 3, 3, 2]"),
        (Short, "3 prompts with [3, 3, 3]"),
    ],
)
def test_an_engine_that_returns_other_groups_is_refused(engine, found, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.engine = engine()
    line = f"rollout.engine: generate() returned {found} completions, but was asked for 4 prompts with 3 each"
    refused(module, f"{line}; return as many")


class Odd(Cutting):
    """One completion of each prompt is changed."""

    def __init__(self, **changes):
        super().__init__()
        self.changes = changes

    def cut(self, rollout):
        return Rollout(
            rollout.prompts, [[*group[:-1], replace(group[-1], **self.changes)] for group in rollout.completions]
        )


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (
            {"token_ids": torch.empty(0).long(), "sampler_logprobs": torch.empty(0)},
            "a completion of 0 tokens, but was asked for 1 to {longest}",
        ),
        (
            {"token_ids": torch.ones(500).long(), "sampler_logprobs": torch.zeros(500)},
            "a completion of 500 tokens, but was asked for 1 to {longest}",
        ),
        ({"token_ids": [1, 2]}, "token_ids that are no tensor of whole numbers (C,)"),
        ({"token_ids": torch.ones(3)}, "token_ids that are no tensor of whole numbers (C,)"),
        ({"token_ids": torch.ones(3, dtype=torch.uint8)}, "token_ids that are no tensor of whole numbers (C,)"),
        (
            {"token_ids": torch.tensor([5, 6]), "sampler_logprobs": torch.zeros(3)},
            "sampler_logprobs that are no tensor (2,), one for each token",
        ),
        (
            {"token_ids": torch.tensor([5, -1]), "sampler_logprobs": torch.zeros(2)},
            "the token id -1, which the model's vocabulary of 99 does not have",
        ),
        (
            {"token_ids": torch.tensor([5, 99]), "sampler_logprobs": torch.zeros(2)},
            "the token id 99, which the model's vocabulary of 99 does not have",
        ),
        ({"finish_reason": "eos"}, "finish_reason='eos', which must be stop or length"),
    ],
)
def test_an_engine_that_returns_what_is_no_completion_is_refused(changes, found, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.engine = Odd(**changes)
    found = found.format(longest=module.sampling.max_completion_length)
    refused(module, f"rollout.engine: generate() returned {found} (row scripted:0)")


def test_an_engine_that_returns_no_rollout_is_refused(micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.engine = Cutting()
    module.engine.cut = lambda rollout: rollout.completions
    refused(module, "rollout.engine: generate() returned a list; return a Rollout")


class Flat(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards.flatten()


class Listed(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards.tolist()


class OfNumPy(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards.numpy() - rewards.numpy().mean(axis=1, keepdims=True)


class Centred(AdvantageEstimator):
    def __call__(self, rewards, everyone=None):
        return rewards - rewards.mean(dim=1, keepdim=True)


@pytest.mark.parametrize(("estimator", "found"), [(Flat, "(12,)"), (Listed, "list"), (OfNumPy, "ndarray")])
def test_advantages_of_another_shape_are_refused(estimator, found, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.advantages = estimator()
    line = f"advantages: {estimator.__name__} returned {found} for rewards of (4, 3); return a tensor of that shape"
    refused(module, line)


def test_an_estimator_of_ones_own_is_asked(micro_model_dir):
    """Without a scale they are those of the setting none, to the bit."""
    own, none = build_module(micro_model_dir, Settings()), build_module(micro_model_dir, Settings(advantages="none"))
    own.advantages = Centred()
    fit(own)
    fit(none)
    assert torch.allclose(weights(own), weights(none), rtol=0, atol=1e-12)


class Learnt(AdvantageEstimator):
    """With a graph, as where a baseline is a network of its own, and in float32."""

    def __call__(self, rewards, everyone=None):
        baseline = torch.nn.Parameter(rewards.float().mean(dim=1, keepdim=True))
        return rewards.float() - baseline


class Noting(AdvantageEstimator):
    """Notes in what it and the rewards compute."""

    def __init__(self):
        super().__init__()
        self.__dict__["seen"] = set()

    def __call__(self, rewards, everyone=None):
        self.seen.add((torch.get_default_dtype(), torch.is_autocast_enabled("cpu")))
        return super().__call__(rewards, everyone)


@pytest.mark.parametrize("precision", ["bf16-true", "bf16-mixed"])
def test_an_estimator_does_not_compute_in_the_precision_of_the_model(precision, micro_model_dir):
    module = build_module(micro_model_dir, Settings(dtype="float32", lora=LoraSettings(r=2)))
    module.advantages = Noting()
    trainer(precision=precision).fit(module, Batches(scripted_prompts()).loader())
    assert module.advantages.seen == {(torch.float32, False)}


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_environments_make_tensors_in_the_usual_dtype(precision, micro_model_dir):
    """They are called by the engine."""
    seen = []

    class Calling(ScriptedEngine):
        def generate(self, *arguments):
            seen.append(torch.get_default_dtype())
            return super().generate(*arguments)

    dtype = "float64" if precision == "64-true" else "float32"
    module = build_module(micro_model_dir, Settings(dtype=dtype, lora=LoraSettings(r=2)))
    module.engine = Calling()
    held_out = Batches(scripted_prompts(generations=1)).loader()
    trainer(precision=precision, limit_val_batches=1, val_check_interval=1).fit(
        module, Batches(scripted_prompts()).loader(), held_out
    )
    assert seen == [torch.float32] * 3


def test_the_graph_of_a_learnt_baseline_is_not_trained_through(micro_model_dir):
    own, none = (build_module(micro_model_dir, Settings(advantages="none", update=TWO)) for _ in range(2))
    own.advantages = Learnt()
    fit(own)
    fit(none)
    assert own.last_scored.advantages.dtype == torch.float64
    assert torch.allclose(weights(own), weights(none), rtol=0, atol=1e-6)


class OfTheBatch(AdvantageEstimator):
    """The difference to the mean of all rewards."""

    def __call__(self, rewards, everyone=None):
        return rewards - everyone.mean()


def test_a_group_of_one_is_trained_on_by_an_estimator_that_compares_with_something_else(micro_model_dir):
    """Its update is that of the same four completions, each with its own advantage: plain REINFORCE by hand."""
    prompts = scripted_prompts(generations=1)
    module = build_module(micro_model_dir, Settings(objective={"loss_type": "reinforce"}), generations=1)
    module.advantages = OfTheBatch(scale_rewards="batch")
    module.configure_model()
    policy, before = copy.deepcopy(module.policy), weights(module)
    trainer().fit(module, Batches(prompts).loader())
    rewards = torch.tensor([prompt.sample["scripted"][0][1] for prompt in prompts], dtype=torch.float64)
    groups = [(prompt.input_ids, [prompt.sample["completions"][0].token_ids]) for prompt in prompts]
    each = padded_logprobs(policy.base_model, groups)[0]
    lengths = [len(group[1][0]) for group in groups]
    advantages = torch.cat([(r - rewards.mean()).expand(n) for r, n in zip(rewards, lengths, strict=True)])
    (-(advantages * each).sum() / sum(lengths)).backward()
    gradient = torch.cat([p.grad.flatten() for p in policy.parameters() if p.requires_grad])
    assert ((before - weights(module)) - gradient).norm() <= 1e-6 * gradient.norm()
    assert not {"reward/std", "advantage_std", "silent_frac"} & module.last_metrics.keys()
    assert all(math.isfinite(value) for value in module.last_metrics.values())


def test_a_group_of_one_is_refused_by_the_estimators_that_compare_within_it(micro_model_dir):
    module = build_module(micro_model_dir, Settings(advantages="none"), generations=1)
    line = "rollout.num_generations=1 must be at least 2; a group of one has nothing to be compared with"
    refused(module, line)
    own = ["experiment=micro", "logger=none", "rollout.num_generations=1"]
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        checks.check(resolved(*own, "advantages=none"))
    checks.check(resolved(*own, f"advantages._target_={__name__}.OfTheBatch"))
    with pytest.raises(
        UserError, match=r"^dynamic_sampling.max_draws=2: every group of rollout.num_generations=1 has "
    ):
        module_of(resolved(*own, f"advantages._target_={__name__}.OfTheBatch", "dynamic_sampling.max_draws=2"))


class Picky(AdvantageEstimator):
    """Compares pairs alone; counts how often it is made."""

    made = 0

    def __init__(self):
        super().__init__(scale_rewards="batch")
        Picky.made += 1

    def check_generations(self, num_generations):
        if num_generations != 2:
            raise UserError("pairs alone")


def test_an_estimator_of_ones_own_is_made_once_and_says_before_the_model_is_loaded_what_it_cannot_compare():
    own = [
        "experiment=micro", "~advantages.scale_rewards", "~advantages.baseline", f"advantages._target_={__name__}.Picky",
        "reward.combine=normalize_then_sum",
    ]  # fmt: skip
    for generations in (2, 4):
        plain = resolved(*own, f"rollout.num_generations={generations}")
        checks.check(plain)
        with pytest.raises(UserError, match="^pairs alone$") if generations == 4 else contextlib.nullcontext():
            module_of(plain)
    assert Picky.made == 2


def test_rewards_normalised_twice_are_refused_in_a_program_too(micro_model_dir):
    module = build_module(micro_model_dir, Settings(advantages="group"))
    module.rewards = RewardSet(module.rewards.functions, combine="normalize_then_sum")
    with pytest.raises(UserError, match="^reward.combine=normalize_then_sum contradicts advantages.scale_rewards=gr"):
        fit(module)


def test_a_function_is_no_estimator(micro_model_dir, monkeypatch):
    monkeypatch.setattr("tests.scripted.AdvantageEstimator", lambda scale: torch.zeros_like)
    with pytest.raises(UserError, match=r"^advantages: not an AdvantageEstimator; subclass it and override __call__"):
        build_module(micro_model_dir, Settings())


@pytest.mark.parametrize(
    ("term", "found"), [(0.5, "a float"), (torch.zeros(3), "a tensor of shape (3,)"), ([], "a list")]
)
def test_a_term_that_cannot_be_added_to_a_loss_is_refused(term, found, micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.__class__ = type("Own", (type(module),), {"auxiliary_loss": lambda self, minibatch: term})
    line = f"Own.auxiliary_loss: it returned {found}, not a scalar tensor; return its mean, or None if there is no term"
    refused(module, line)


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (lambda: AdvantageEstimator(True), "advantages.scale_rewards=True: there is no such choice; choose group, batch, none"),
        (lambda: AdvantageEstimator(baseline="loo"), "advantages.baseline='loo': there is no such choice; choose mean, rloo, length"),
        (lambda: Schedule("warmup"), "scheduler.name='warmup': there is no such choice; choose cosine, linear, constant"),
        (lambda: Objective(8, "seq"), "objective.importance_sampling_level='seq': there is no such choice; choose token, "),
        (lambda: Objective(8, beta=0.1, kl_estimator="k4"), "objective.kl_estimator='k4': there is no such choice; choose k1"),
        (lambda: MismatchCorrection("tokens", "mask", 2.0), "objective.mismatch.level='tokens': there is no such choice"),
        (lambda: MismatchCorrection("token", "clip", 2.0), "objective.mismatch.how='clip': there is no such choice"),
        (lambda: RewardSet({"a": RewardSpec(len)}, "gdpo"), "reward.combine='gdpo': there is no such choice; choose weigh"),
        (lambda: UpdateSettings(num_iterations=0), "update.num_iterations=0 must be at least 1"),
        (lambda: UpdateSettings(num_minibatches=0), "update.num_minibatches=0 must be at least 1"),
        (lambda: ValidationSettings(0), "validation.num_generations=0 must be at least 1"),
    ],
)  # fmt: skip
def test_a_word_that_would_be_taken_for_another_is_refused_where_no_config_is(make, line):
    with pytest.raises(UserError, match=f"^{re.escape(line)}"):
        make()
