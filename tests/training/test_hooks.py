"""Lightning's hooks in a subclass: each is called, or refused; none switches off what the module does in its own."""

from __future__ import annotations

import re
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.core.hooks import CheckpointHooks, DataHooks, ModelHooks

from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.training.hooks import AT_WORK, NEVER_CALLED
from tests.scripted import Batches, Settings, build_module, scripted_prompts, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
VALIDATES = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}


def subclass(folder, members, rollouts=1, **update):
    module = build_module(folder, Settings(rollouts=rollouts, update=update))
    module.__class__ = type("Own", (GSPOModule,), members)
    return module


def fit(module, batches=1, ckpt_path=None, **changes):
    runner = trainer(**{**VALIDATES, **changes})
    held_out = Batches(scripted_prompts(generations=1)).loader()
    runner.fit(module, Batches(scripted_prompts(), batches).loader(), held_out, ckpt_path=ckpt_path, weights_only=True)
    return runner


def silent(name):
    """An override that only looks at what it is given."""

    def hook(self, *args, **kwargs):
        return None

    hook.__name__, hook.__qualname__ = name, f"Own.{name}"
    return hook


# ---------------------------------------------------------------- super()


@pytest.mark.parametrize("name", [name for name in AT_WORK if name != "on_save_checkpoint"])
def test_an_override_that_leaves_super_out_is_refused_by_name(name, micro_model_dir, tmp_path):
    path = tmp_path / "last.ckpt"
    if name == "on_load_checkpoint":
        fit(subclass(micro_model_dir, {}, rollouts=2), max_epochs=1).save_checkpoint(path)
    module = subclass(micro_model_dir, {name: silent(name)}, rollouts=2)
    with pytest.raises(UserError) as refused:
        fit(module, max_epochs=2, ckpt_path=path if path.exists() else None)
    assert str(refused.value) == f"Own.{name}: it did not call super().{name}(), which {AT_WORK[name]}; call it"


def test_a_checkpoint_without_super_holds_what_ours_would_save_and_says_so(micro_model_dir, tmp_path):
    def own(self, checkpoint):
        checkpoint["mine"] = 7

    own.__qualname__ = "Own.on_save_checkpoint"
    runner = fit(subclass(micro_model_dir, {"on_save_checkpoint": own}, rollouts=2), max_epochs=1)
    with pytest.warns(UserWarning) as said:
        runner.save_checkpoint(tmp_path / "last.ckpt")
    line = "Own.on_save_checkpoint: it did not call super().on_save_checkpoint(), which saves the counters of the run; "
    assert f"{line}it was called after it" in [str(warning.message) for warning in said]
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert (saved["mine"], saved["gspo_lightning"]["rollouts_done"]) == (7, 1)


class Between(GSPOModule):
    """Calls ours by its name, and is a base of others."""

    def on_fit_start(self):
        GSPOModule.on_fit_start(self)

    def configure_model(self):
        if self.policy is None:  # Lightning calls it more than once
            super().configure_model()


class Mixed:
    """A mixin that does not know of super()."""

    def on_train_start(self):
        self.begun = True


def test_ours_called_by_name_and_in_a_base_and_not_twice_is_accepted(micro_model_dir, tmp_path):
    class Last(Between):
        def on_fit_start(self):
            self.first = self.policy is not None
            super().on_fit_start()

        def on_save_checkpoint(self, checkpoint):
            super().on_save_checkpoint(checkpoint)

    module = build_module(micro_model_dir, Settings())
    module.__class__ = Last
    module.configure_model()
    with warnings.catch_warnings(record=True) as said:
        fit(module).save_checkpoint(tmp_path / "last.ckpt")
    assert module.first and module.rollouts_done == 1
    assert not any("super()" in str(warning.message) for warning in said)


def test_a_mixin_is_asked_too(micro_model_dir):
    module = build_module(micro_model_dir, Settings())
    module.__class__ = type("Own", (Mixed, GSPOModule), {})
    with pytest.raises(UserError, match=r"^Mixed.on_train_start: it did not call super\(\).on_train_start\(\), which"):
        fit(module)


def test_a_batch_that_is_passed_over_needs_no_rollout(micro_model_dir):
    module = subclass(micro_model_dir, {"on_train_batch_start": lambda self, batch, batch_idx: -1}, rollouts=2)
    fit(module, max_epochs=1)
    assert module.rollouts_done == 0


# ---------------------------------------------------------------- called and never called


@pytest.mark.parametrize("name", NEVER_CALLED)
def test_a_hook_that_is_never_called_is_refused_with_what_to_do(name, micro_model_dir):
    line = f"Own.{name} is never called, because optimization is manual: {NEVER_CALLED[name]}"
    module = subclass(micro_model_dir, {name: silent(name)})
    with pytest.raises(UserError, match=f"^{re.escape(line)}$"):
        fit(module)
    assert module.rollouts_done == 0


ELSEWHERE = {"configure_sharded_model", "on_gpu", "on_validation_model_zero_grad"}
"""What Lightning refuses beside configure_model, a property, and what it calls where gradients are accumulated."""


def counted(base, calls):
    """A class whose hooks all count and then do what they did."""
    hooks = [name for kind in (ModelHooks, DataHooks, CheckpointHooks, L.LightningModule) for name in vars(kind)]
    named = ("on_", "optimizer_", "lr_scheduler_step", "backward", "configure_", "transfer_", "setup", "teardown")

    def counting(name):
        def hook(self, *args, **kwargs):
            calls[name] = calls.get(name, 0) + 1
            return getattr(super(cls, self), name)(*args, **kwargs)

        return hook

    members = {name: counting(name) for name in hooks if name.startswith(named) and name not in ELSEWHERE}
    cls = type("Counted", (base,), members)
    return cls, set(members)


def test_all_other_hooks_of_a_fit_are_called(micro_model_dir, monkeypatch, tmp_path):
    """Two rollouts of two minibatches, each of one micro-batch; a fit from a checkpoint loads one."""
    monkeypatch.setattr("gspo_lightning.training.trainer_checks.refuse_uncalled", lambda module: None)
    fit(subclass(micro_model_dir, {}, rollouts=3), max_epochs=1).save_checkpoint(tmp_path / "last.ckpt")
    calls = {}
    module = build_module(micro_model_dir, Settings(rollouts=3, update={"num_minibatches": 2}))
    module.__class__, hooks = counted(GSPOModule, calls)
    fit(module, batches=2, ckpt_path=tmp_path / "last.ckpt").save_checkpoint(tmp_path / "again.ckpt")
    assert {name for name in hooks - calls.keys() if not re.match(r"on_(test|predict)_", name)} == NEVER_CALLED.keys()
    steps = ("on_before_optimizer_step", "on_before_zero_grad", "on_before_backward", "backward", "on_after_backward")
    assert {calls[name] for name in steps} == {4} and calls["on_train_batch_end"] == 2


class Watching(L.Callback):
    """The weights and the gradient at each step."""

    def __init__(self):
        self.seen = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = [p.grad.flatten() for p in pl_module.policy.parameters() if p.grad is not None]
        self.seen.append(("gradient", torch.cat(grads).norm().item(), weights(pl_module)))

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        assert type(optimizer) is torch.optim.SGD
        self.seen.append(("step", sum(p.grad is not None for p in pl_module.parameters()) > 0, weights(pl_module)))


def test_a_callback_sees_the_clipped_gradient_before_a_step_and_the_new_weights_after_it(micro_model_dir):
    watching = Watching()
    fit(subclass(micro_model_dir, {}, num_minibatches=2, max_grad_norm=1e-3), callbacks=[watching])
    assert [kind for kind, *_ in watching.seen] == ["gradient", "step"] * 2
    for (_, norm, before), (_, has_gradient, after) in zip(watching.seen[::2], watching.seen[1::2], strict=True):
        assert norm == pytest.approx(1e-3, rel=1e-3) and has_gradient
        assert (before - after).norm().item() == pytest.approx(norm, rel=1e-6)  # SGD at rate 1


@pytest.mark.parametrize("name", ["configure_model", "training_step", "validation_step"])
def test_a_function_assigned_to_the_object_must_call_ours_too(name, micro_model_dir):
    module = subclass(micro_model_dir, {}, rollouts=2)
    setattr(module, name, lambda *args: None)
    with pytest.raises(UserError) as refused:
        fit(module, max_epochs=2)
    assert str(refused.value) == (
        f"Own.{name}, assigned to the object: it did not call super().{name}(), which {AT_WORK[name]}; call it"
    )


def test_one_that_calls_it_and_a_validation_of_ones_own_batches_are_accepted(micro_model_dir):
    seen = []

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        if dataloader_idx == 0:
            super(type(self), self).validation_step(batch, batch_idx)
        else:
            seen.append(batch)

    module = subclass(micro_model_dir, {"validation_step": validation_step})
    ours = module.on_train_start
    module.on_train_start = lambda: seen.append(ours())
    held_out = [Batches(scripted_prompts(generations=1)).loader(), torch.utils.data.DataLoader(torch.ones(1))]
    trainer(**VALIDATES).fit(module, Batches(scripted_prompts(), 1).loader(), held_out)
    assert seen == [None, torch.ones(1)] and module.rollouts_done == 1 and module.last_validation["val/accuracy"] == 0
