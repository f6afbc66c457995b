"""The state dict of a module holds what is trained, whatever it is a part of, and loads strictly."""

from __future__ import annotations

import copy
import functools
import io
from dataclasses import replace

import lightning as L
import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from lightning.pytorch.callbacks import EMAWeightAveraging, WeightAveraging
from torch import nn

from gspo_lightning.callbacks import RolloutCheckpoint
from gspo_lightning.policy.load import LoraSettings
from gspo_lightning.rollout.engine import EngineUnavailableError
from gspo_lightning.training.run_state import leave_frozen_out
from tests.scripted import Batches, ScriptedEngine, Settings, build_module, scripted_prompts, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
ADAPTED = Settings(dtype="float32", lora=LoraSettings(r=2), optimizer=functools.partial(torch.optim.SGD, lr=0.1))


def adapted(folder, rollouts=1):
    torch.manual_seed(0)  # which the adapter is drawn by
    module = build_module(folder, ADAPTED)
    module.max_rollouts = rollouts
    module.configure_model()
    return module


class Saver(L.Callback):
    """Saves behind the last rollout, before averaged weights take the place of the trained ones."""

    def __init__(self, folder):
        self.path = folder / "half.ckpt"

    def on_train_epoch_end(self, trainer, pl_module):
        trainer.save_checkpoint(self.path)


def trained(module):
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_a_frozen_base_is_in_no_state_dict(micro_model_dir):
    module = adapted(micro_model_dir)
    names = trained(module)
    assert set(module.state_dict()) == names and all("lora" in name for name in names)
    assert set(module.state_dict(prefix="own.")) == {f"own.{name}" for name in names}
    outer = nn.ModuleDict({"first": module, "second": nn.Linear(2, 2).requires_grad_(False)})
    expected = {f"first.{name}" for name in names} | {"second.weight", "second.bias"}  # that one is not ours to drop
    assert set(outer.state_dict()) == expected


def test_a_frozen_base_in_eight_bits_is_in_no_state_dict_and_loads_after_a_forward():
    """Its layers have a scale beside the weight, and refuse to load one once they have computed."""
    layer = Linear8bitLt(16, 8, bias=False, has_fp16_weights=False).eval()
    layer.weight = layer.weight.to("cpu")
    module = nn.Sequential(layer.requires_grad_(False), nn.Linear(8, 4))
    leave_frozen_out(module)
    for _ in range(2):
        assert set(state := module.state_dict()) == {"1.weight", "1.bias"}
        module.load_state_dict(state)
        before = module(torch.ones(2, 16))
    assert torch.equal(module(torch.ones(2, 16)), before)


def test_a_state_dict_without_the_base_loads_strictly_and_leaves_the_base(micro_model_dir):
    module, other = adapted(micro_model_dir), adapted(micro_model_dir)
    with torch.no_grad():
        for number, parameter in enumerate(other.parameters()):
            parameter.fill_(number)
    before = [p.clone() for p in other.parameters()]
    nn.ModuleDict({"child": other}).load_state_dict(nn.ModuleDict({"child": module}).state_dict())
    assert torch.equal(weights(other), weights(module))
    for parameter, value in zip(other.parameters(), before, strict=True):
        assert parameter.requires_grad or torch.equal(parameter, value)
    state = module.state_dict()
    del state[sorted(state)[0]]
    with pytest.raises(RuntimeError, match="Missing key"):
        other.load_state_dict(state)


def test_averaged_weights_are_saved_without_the_base_and_resumed(micro_model_dir, tmp_path):
    fit = Batches(scripted_prompts(), 4).loader
    straight, half, resumed = (adapted(micro_model_dir, rollouts) for rollouts in (4, 2, 4))
    trainer(callbacks=[EMAWeightAveraging(decay=0.5)]).fit(straight, fit())
    path, first = tmp_path / "half.ckpt", trainer(callbacks=[EMAWeightAveraging(decay=0.5), Saver(tmp_path)])
    first.fit(half, fit())
    saved = torch.load(path, weights_only=True)
    assert set(saved["state_dict"]) == set(saved["current_model_state"]) == trained(half)
    trainer(callbacks=[EMAWeightAveraging(decay=0.5)]).fit(resumed, fit(), ckpt_path=path, weights_only=True)
    assert resumed.rollouts_done == 4 and torch.equal(weights(resumed), weights(straight))


def test_a_run_goes_on_with_the_trained_weights_where_it_averages_no_more(micro_model_dir, tmp_path):
    """Averaging changes no update; a validation of the checkpoint is one of the average."""
    path, data = tmp_path / "half.ckpt", Batches(scripted_prompts(), 4).loader
    straight, half, resumed, read = (adapted(micro_model_dir, rollouts) for rollouts in (4, 2, 4, 2))
    trainer().fit(straight, data())
    trainer(callbacks=[EMAWeightAveraging(decay=0.5), Saver(tmp_path)]).fit(half, data())
    trainer().fit(resumed, data(), ckpt_path=path, weights_only=True)
    assert resumed.rollouts_done == 4 and torch.equal(weights(resumed), weights(straight))
    held_out = Batches(scripted_prompts(generations=1)).loader()
    trainer(limit_val_batches=1).validate(read, held_out, ckpt_path=path, weights_only=True, verbose=False)
    assert torch.equal(weights(read), weights(half))


class Kept(L.Callback):
    """The trained weights after each rollout, before averaged ones take their place, and the number of steps."""

    def __init__(self):
        self.after, self.steps = [], 0

    def on_before_zero_grad(self, trainer, pl_module, optimizer):
        self.steps += 1

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.after.append(weights(pl_module))


def test_weights_are_averaged_once_per_rollout_and_not_once_per_step(micro_model_dir):
    """With decay 1/2 the average is that of the first rollout at first, then half of itself and half of the newest."""
    module = build_module(micro_model_dir, Settings(rollouts=3, update={"num_minibatches": 2}))
    kept = Kept()
    trainer(callbacks=[kept, EMAWeightAveraging(decay=0.5)]).fit(module, Batches(scripted_prompts(), 3).loader())
    first, second, third = kept.after
    assert kept.steps == 6 and not torch.equal(first, third)
    expected = (first + second) / 4 + third / 2
    assert torch.allclose(weights(module), expected, rtol=0, atol=1e-14)


class Never(WeightAveraging):
    def should_update(self, step_idx=None, epoch_idx=None):
        return False


class Validated(L.Callback):
    """The weights in each validation of the run."""

    def __init__(self):
        self.seen = []

    def on_validation_batch_start(self, trainer, pl_module, *_):
        self.seen.append(weights(pl_module))


class Loaders(L.LightningDataModule):
    def train_dataloader(self):
        return Batches(scripted_prompts(), 4).loader()

    def val_dataloader(self):
        return Batches(scripted_prompts(generations=1)).loader()


AFTER_EACH = {"limit_val_batches": 1, "val_check_interval": 1, "check_val_every_n_epoch": None}


@pytest.mark.parametrize(
    ("make", "begins"), [(lambda: EMAWeightAveraging(decay=0.5, update_starting_at_step=4), 3), (Never, 5)]
)
def test_before_weights_are_averaged_the_trained_ones_are_validated_and_stay(make, begins, micro_model_dir):
    """Rollouts of two steps: the average begins with the weights after the third, if at all."""
    module = build_module(micro_model_dir, Settings(rollouts=4, update={"num_minibatches": 2}))
    kept, validated = Kept(), Validated()
    trainer(callbacks=[kept, make(), validated], **AFTER_EACH).fit(module, datamodule=Loaders())
    expected = kept.after[:3] + [(kept.after[2] + kept.after[3]) / 2 if begins == 3 else kept.after[3]]
    assert len(validated.seen) == 4 and not torch.equal(kept.after[2], kept.after[3])
    for seen, of in zip([*validated.seen, weights(module)], [*expected, expected[-1]], strict=True):
        assert torch.allclose(seen, of, rtol=0, atol=1e-14)


def test_a_callback_that_averaged_before_averages_in_a_second_fit(micro_model_dir):
    """It begins anew, with as few steps as the new Trainer has taken."""
    module, average = build_module(micro_model_dir, Settings(rollouts=2)), EMAWeightAveraging(decay=0.5)
    trainer(callbacks=[average]).fit(module, Batches(scripted_prompts(), 2).loader())
    module.max_rollouts, kept = 4, Kept()
    trainer(callbacks=[kept, average]).fit(module, Batches(scripted_prompts(), 2).loader())
    assert not torch.equal(*kept.after)
    assert torch.allclose(weights(module), sum(kept.after) / 2, rtol=0, atol=1e-14)


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_an_average_leaves_frozen_weights_and_constants_alone(quantization, micro_model_dir, tmp_path):
    """By rounding 0.9 w + 0.1 w is not w, and of packed 4-bit weights another weight."""

    def fit(rollouts, *callbacks, ckpt_path=None):
        torch.manual_seed(0)
        module = build_module(micro_model_dir, ADAPTED)
        module.policy_loader = replace(module.policy_loader, quantization=quantization)
        module.max_rollouts = rollouts
        runner = trainer(callbacks=[EMAWeightAveraging(decay=0.9), *callbacks])
        runner.fit(module, Batches(scripted_prompts(), 4).loader(), ckpt_path=ckpt_path, weights_only=True)
        return module

    loaded = replace(build_module(micro_model_dir, ADAPTED).policy_loader, quantization=quantization).load()
    straight, _ = fit(4), fit(2, Saver(tmp_path))
    resumed = fit(4, ckpt_path=tmp_path / "half.ckpt")
    for (name, ours), theirs in zip(tensors(straight.policy).items(), tensors(loaded).values(), strict=True):
        assert "lora" in name or torch.equal(ours, theirs), name
    for (name, ours), theirs in zip(tensors(resumed).items(), tensors(straight).values(), strict=True):
        assert torch.equal(ours, theirs), name


def tensors(module):
    return dict([*module.named_parameters(), *module.named_buffers()])


class Lost(ScriptedEngine):
    """Has nobody left to sample for the first validation within a run."""

    asked = 0

    def generate(self, policy, prompts, sampling, seed):
        type(self).asked += (is_held_out := sampling.num_generations == 1)
        if is_held_out and self.asked == 1:
            raise EngineUnavailableError("nobody is left")
        return super().generate(policy, prompts, sampling, seed)


def test_a_validation_that_breaks_off_leaves_the_trained_weights_in_place(micro_model_dir, tmp_path):
    """Not the average, which it was run with: the run is saved on such an error, and goes on from there."""

    def fit(module, **changes):
        callbacks = [EMAWeightAveraging(decay=0.5), RolloutCheckpoint(tmp_path, 1, 2)]
        settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
        trainer(callbacks=callbacks, **settings).fit(module, datamodule=Loaders(), weights_only=True, **changes)

    straight, lost, resumed = (build_module(micro_model_dir, Settings(rollouts=4)) for _ in range(3))
    fit(straight)
    lost.engine = Lost()
    with pytest.raises(EngineUnavailableError):
        fit(lost)
    fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(straight))


def test_what_is_saved_at_the_end_of_a_run_is_not_the_average_that_takes_its_place(micro_model_dir, tmp_path):
    """Where another than ours ends the run, the last rollouts are saved at its end."""

    def fit(module, ckpt_path=None, **changes):
        callbacks = [EMAWeightAveraging(decay=0.5), RolloutCheckpoint(tmp_path, 10)]
        data = Batches(scripted_prompts(), 4).loader()
        trainer(callbacks=callbacks, **changes).fit(module, data, ckpt_path=ckpt_path, weights_only=True)

    straight, half, resumed = (build_module(micro_model_dir, Settings(rollouts=4)) for _ in range(3))
    fit(straight)
    fit(half, max_steps=2)
    assert half.rollouts_done == 2
    fit(resumed, ckpt_path=tmp_path / "last.ckpt")
    assert torch.equal(weights(resumed), weights(straight))


@pytest.mark.parametrize("settings", [Settings(), ADAPTED], ids=["whole", "adapter"])
def test_a_module_survives_pickling_and_copies_stand_alone(settings, micro_model_dir):
    module = build_module(micro_model_dir, settings)
    module.configure_model()
    file, ids = io.BytesIO(), torch.arange(3, 12)[None]
    torch.save(module, file)
    file.seek(0)
    again, copied = torch.load(file, weights_only=False), copy.deepcopy(module)
    expected = module.policy.model(input_ids=ids).logits
    assert torch.equal(again.policy.model(input_ids=ids).logits, expected)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.zero_()
    for other in (again, copied):
        assert torch.equal(other.policy.model(input_ids=ids).logits, expected)
    assert not module.policy.model(input_ids=ids).logits.any()
