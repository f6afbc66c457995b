"""In programs of others: what Lightning offers and this module cannot be is refused, and the rest counts in rollouts."""

from __future__ import annotations

import csv
import pickle
import re
import warnings
from dataclasses import replace
from functools import partial

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    LearningRateFinder,
    ModelPruning,
    OnExceptionCheckpoint,
    SpikeDetection,
    StochasticWeightAveraging,
)
from lightning.pytorch.tuner import Tuner
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader

from gspo_lightning.callbacks import RunRecorder
from gspo_lightning.callbacks.checkpoint import RolloutCheckpoint
from gspo_lightning.errors import UserError
from gspo_lightning.module import GSPOModule
from gspo_lightning.policy.load import LoraSettings, PolicyLoader
from gspo_lightning.policy.model import Policy
from gspo_lightning.rewards import RewardSet, RewardSpec
from gspo_lightning.rollout.engine import EngineUnavailableError
from gspo_lightning.types import PromptBatch
from tests.scripted import Batches, ScriptedEngine, Settings, build_module, scripted_prompts, trainer, weights

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Data(L.LightningDataModule):
    """The same prompts again and again."""

    batch_size = 4

    def train_dataloader(self):
        return Batches(scripted_prompts(), 8).loader()

    def val_dataloader(self):
        return Batches(scripted_prompts(generations=1)).loader()


def made(folder, cls=GSPOModule, **settings):
    module = build_module(folder, Settings(update={"num_minibatches": 2}, **settings))
    module.__class__ = cls
    return module


def refused(line):
    return pytest.raises(UserError, match=f"^{re.escape(line)}$")


# ---------------------------------------------------------------- who calls


class Parent(L.LightningModule):
    def __init__(self, child, collects):
        super().__init__()
        self.child, self.collects, self.automatic_optimization = child, collects, False

    def configure_model(self):
        self.child.configure_model()

    def configure_optimizers(self):
        return self.child.configure_optimizers()

    def training_step(self, batch, batch_idx):
        if self.collects:
            self.child.on_train_batch_start(batch, batch_idx)
        self.child.training_step(batch, batch_idx)


@pytest.mark.parametrize("collects", [True, False])
def test_a_part_of_another_module_is_refused(collects, micro_model_dir):
    parent = Parent(made(micro_model_dir), collects)
    line = (
        "GSPOModule is a part of Parent, whose hooks alone Lightning calls; let that be a subclass of GSPOModule, which "
        "holds the other parts"
    )
    with refused(line):
        trainer().fit(parent, datamodule=Data())


def test_without_a_trainer_the_line_names_the_pieces_for_a_loop_of_ones_own(micro_model_dir):
    line = (
        "GSPOModule is trained by a Trainer alone; with Fabric or in a loop of your own use gspo_lightning.objective and "
        "gspo_lightning.packing, as examples/bare_loop.py does"
    )
    module, (batch,) = made(micro_model_dir), Batches(scripted_prompts()).loader()
    module.configure_model()
    with refused(line):
        module.on_train_batch_start(batch, 0)
    fabric = L.Fabric(accelerator="cpu", devices=1)
    wrapped, _ = fabric.setup(module, torch.optim.SGD(module.parameters(), lr=0.1))
    with refused(line):
        wrapped.training_step(batch, 0)


# ---------------------------------------------------------------- what a step returns


class Lossy(GSPOModule):
    as_dict = False

    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        loss = sum(parameter.square().sum() for parameter in self.parameters())
        return {"loss": loss, "rollout": self.rollouts_done} if self.as_dict else loss


class LossyDict(Lossy):
    as_dict = True


class Telling(GSPOModule):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        return {"loss": torch.tensor(1.0), "rollout": self.rollouts_done}


@pytest.mark.parametrize("cls", [Lossy, LossyDict])
def test_a_loss_that_nobody_would_train_on_is_refused(cls, micro_model_dir):
    line = (
        "Lossy.training_step: the loss that it returns is not trained on, because optimization is manual; return it "
        "from auxiliary_loss"
    )
    with refused(line):
        trainer().fit(made(micro_model_dir, cls), datamodule=Data())


def test_what_a_step_tells_callbacks_reaches_them(micro_model_dir):
    told = []

    class Listener(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            told.append(outputs["rollout"])

    trainer(callbacks=[Listener()]).fit(made(micro_model_dir, Telling, rollouts=2), datamodule=Data())
    assert told == [1, 2]


# ---------------------------------------------------------------- tuners, trials


RATES = (
    "callbacks: LearningRateFinder looks at the loss that training_step returns, and a rollout has none; compare rates "
    "by the rewards that they lead to (docs/sweeps.md)"
)
SIZES = (
    "callbacks: BatchSizeFinder would use up max_rollouts in its trials; leave it out, since micro-batches are cut by "
    "themselves where memory runs out"
)
AVERAGES = (
    "callbacks: StochasticWeightAveraging averages once per epoch, but a run is one epoch, and it replaces the "
    "learning-rate schedule; use EMAWeightAveraging"
)
SPIKES = (
    "callbacks: SpikeDetection looks at the loss that training_step returns, and a rollout has none; leave it out, since a "
    "step with a gradient that is not finite is skipped by itself (update.max_nonfinite_steps)"
)
PRUNES = (
    "callbacks: ModelPruning looks for weights before the policy is loaded, and masks them in forwards that are not its "
    "own here; leave it out, and load a model that was pruned"
)


@pytest.mark.parametrize(
    ("tune", "line"),
    [
        (lambda module: trainer(callbacks=[SpikeDetection()]).fit(module, datamodule=Data()), SPIKES),
        (lambda module: trainer(callbacks=[ModelPruning("l1_unstructured")]).fit(module, datamodule=Data()), PRUNES),
        (lambda module: Tuner(trainer()).lr_find(module, datamodule=Data()), RATES),
        (lambda module: trainer(callbacks=[LearningRateFinder()]).fit(module, datamodule=Data()), RATES),
        (lambda module: Tuner(trainer()).scale_batch_size(module, datamodule=Data()), SIZES),
        (lambda module: trainer(callbacks=[BatchSizeFinder()]).fit(module, datamodule=Data()), SIZES),
        (lambda module: trainer(callbacks=[StochasticWeightAveraging(0.01)]).fit(module, datamodule=Data()), AVERAGES),
    ],
)
def test_callbacks_that_would_find_nothing_are_refused(tune, line, micro_model_dir):
    module = made(micro_model_dir, rollouts=2)
    module.lr = 0.1
    with refused(line):
        tune(module)
    assert module.rollouts_done == 0 and module.policy is None


@pytest.mark.parametrize("count", [1, 3])
def test_a_trial_of_n_batches_is_n_rollouts_and_a_validation(count, micro_model_dir):
    """Each of two optimizer steps."""
    module, seen = made(micro_model_dir, rollouts=5), []

    class Seen(L.Callback):
        def on_validation_end(self, trainer, pl_module):
            seen.append(pl_module.rollouts_done)

    trainer(callbacks=[Seen()], fast_dev_run=count, limit_val_batches=1).fit(module, datamodule=Data())
    assert module.rollouts_done == count and seen == [count]


# ---------------------------------------------------------------- checkpoints within a rollout


class Break(L.Callback):
    """Ends the run before or after the first of the optimizer steps of the second rollout."""

    def __init__(self, after_step):
        self.after_step = after_step

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if pl_module.rollouts_done == 1 and not self.after_step:
            raise ValueError("stopped by hand")

    def on_after_backward(self, trainer, pl_module):
        if pl_module.counts["optimizer_steps"] == 3:
            raise ValueError("stopped by hand")


def warned(folder, path, after_step):
    """The lines about a checkpoint that Lightning saves when a run breaks off, and the module that resumes from it."""
    module = made(folder, rollouts=2)
    saving = OnExceptionCheckpoint(path, "broken")
    with warnings.catch_warnings(record=True) as caught, pytest.raises(ValueError, match="stopped by hand"):
        warnings.simplefilter("always")
        trainer(callbacks=[Break(after_step), saving], enable_checkpointing=True).fit(module, datamodule=Data())
    again = made(folder, rollouts=2)
    trainer().fit(again, datamodule=Data(), ckpt_path=path / "broken.ckpt", weights_only=True)
    return [str(w.message) for w in caught if str(w.message).startswith("checkpoint:")], again


def test_a_checkpoint_within_a_rollout_says_so_if_weights_have_moved(micro_model_dir, tmp_path):
    whole = made(micro_model_dir, rollouts=2)
    trainer().fit(whole, datamodule=Data())
    lines, again = warned(micro_model_dir, tmp_path / "before", after_step=False)
    assert lines == [] and torch.equal(weights(again), weights(whole))
    lines, again = warned(micro_model_dir, tmp_path / "after", after_step=True)
    assert lines == [
        "checkpoint: its weights have taken 1 optimizer step of rollout 2, which a run that resumes from it begins anew; "
        "gspo_lightning.callbacks.checkpoint.RolloutCheckpoint saves whole rollouts"
    ]
    assert not torch.equal(weights(again), weights(whole))


class Losing(ScriptedEngine):
    """Has nobody left to sample in the fourth rollout."""

    def generate(self, policy, prompts, sampling, seed):
        if sampling.num_generations == 3 and seed == 3:
            raise EngineUnavailableError("nobody is left")
        return super().generate(policy, prompts, sampling, seed)


class Seen(L.Callback):
    """Rollouts after which was validated, and those whose checkpoint was there after the next one began."""

    def __init__(self, path):
        self.path, self.validated, self.saved = path, [], []

    def on_validation_end(self, trainer, pl_module):
        self.validated.append(pl_module.rollouts_done)

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.rollouts_done:
            self.saved.append(torch.load(self.path, weights_only=True)["gspo_lightning"]["rollouts_done"])


@pytest.mark.parametrize("by", [RolloutCheckpoint, OnExceptionCheckpoint])
def test_a_rollout_that_broke_off_moves_no_validation_and_no_checkpoint_that_waits_for_one(
    by, micro_model_dir, tmp_path
):
    module, last = made(micro_model_dir, rollouts=8), tmp_path / "last.ckpt"
    settings = {"limit_val_batches": 1, "val_check_interval": 2, "check_val_every_n_epoch": None}
    saving = RolloutCheckpoint(tmp_path, 10, 2) if by is RolloutCheckpoint else OnExceptionCheckpoint(tmp_path, "last")
    module.engine = Losing()
    with pytest.raises(EngineUnavailableError):
        runner = trainer(callbacks=[saving], enable_checkpointing=by is OnExceptionCheckpoint, **settings)
        runner.fit(module, datamodule=Data())
    again, seen = made(micro_model_dir, rollouts=8), Seen(last)
    runner = trainer(callbacks=[seen, RolloutCheckpoint(tmp_path, 2, 2)], **settings)
    runner.fit(again, datamodule=Data(), ckpt_path=last, weights_only=True)
    assert again.rollouts_done == 8 and seen.validated == [4, 6, 8]
    assert seen.saved == [3, 4, 4, 6, 6]


# ---------------------------------------------------------------- conversions


def test_a_module_that_was_compiled_as_a_whole_is_refused(micro_model_dir):
    line = (
        "torch.compile: GSPOModule is compiled as a whole, reward functions included; give the Trainer the module "
        "itself, and PolicyLoader compile=True"
    )
    with refused(line):
        trainer().fit(torch.compile(made(micro_model_dir), backend="eager"), datamodule=Data())
    with refused(line):
        trainer(limit_val_batches=1).validate(torch.compile(made(micro_model_dir), backend="eager"), datamodule=Data())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lora", [None, LoraSettings(r=2)], ids=["whole", "adapter"])
def test_weights_that_were_narrowed_behind_the_loader_are_refused(lora, dtype, micro_model_dir):
    module = made(micro_model_dir, dtype="float32", lora=lora)
    module.configure_model()
    module.to(dtype)
    with pytest.raises(
        UserError, match=rf"^model\.\S* is trained, but in {dtype}, where .*; do not convert the module"
    ):
        trainer().fit(module, datamodule=Data())
    assert module.rollouts_done == 0


def test_a_policy_of_ones_own_that_drops_out_is_refused(micro_model_dir):
    """`PolicyLoader` refuses dropout by the model's config and by its own settings of an adapter."""
    loader = PolicyLoader(str(micro_model_dir))
    adapted = get_peft_model(loader.load_model(), LoraConfig(r=2, lora_dropout=0.1, target_modules=["q_proj"]))
    module = made(micro_model_dir)
    module.policy = Policy(adapted, loader.load_tokenizer())
    with pytest.raises(UserError, match=r"^policy\.model\.\S*lora_dropout\.default drops out at a rate of 0\.1, with"):
        trainer().fit(module, datamodule=Data())
    assert module.rollouts_done == 0


# ---------------------------------------------------------------- values of one's own


class Logging(GSPOModule):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        self.log("own/mean", float(self.rollouts_done), on_epoch=True, on_step=False)

    def validation_step(self, batch, batch_idx):
        self.log("own/prompts", float(len(batch)))
        self.log("own/given", float(len(batch)), batch_size=1)
        super().validation_step(batch, batch_idx)


def test_held_out_prompts_of_several_loaders_are_measured_together(micro_model_dir):
    one, four = (PromptBatch(scripted_prompts(seed=n, count=n, generations=1)) for n in (1, 4))
    measured = []
    for loaders in ([one, four],), ([one], [four]):
        module = made(micro_model_dir)
        runner = trainer(limit_val_batches=1.0)
        runner.validate(module, [DataLoader(batches, batch_size=None) for batches in loaders], verbose=False)
        measured.append(module.last_validation)
    assert measured[0] == measured[1] and measured[0]["val/reward"] > 0


def test_what_a_step_logs_of_several_loaders_is_recorded(micro_model_dir, tmp_path):
    class OfLoaders(GSPOModule):
        def validation_step(self, batch, batch_idx, dataloader_idx=0):
            self.log("own/loader", 2.0 + dataloader_idx)
            super().validation_step(batch, batch_idx)

    loaders = [Batches(scripted_prompts(generations=1)).loader() for _ in range(2)]
    runner = trainer(limit_val_batches=1, callbacks=[RunRecorder(tmp_path)])
    runner.fit(made(micro_model_dir, OfLoaders), Batches(scripted_prompts()).loader(), loaders)
    (row,) = csv.DictReader((tmp_path / "metrics.csv").open())
    assert (row["own/loader/dataloader_idx_0"], row["own/loader/dataloader_idx_1"]) == ("2.0", "3.0")


def test_values_that_a_step_logs_are_means_over_prompts(micro_model_dir):
    """Rollouts of 4 and 2 prompts, validations of 1 and 4: (1*4 + 2*2) / 6, and (1*1 + 4*4) / 5."""

    class Uneven(Data):
        def train_dataloader(self):
            return DataLoader([PromptBatch(scripted_prompts(count=n)) for n in (4, 2)], batch_size=None)

        def val_dataloader(self):
            return DataLoader([PromptBatch(scripted_prompts(count=n, generations=1)) for n in (1, 4)], batch_size=None)

    runner = trainer(limit_val_batches=1.0)
    runner.fit(made(micro_model_dir, Logging, rollouts=2), datamodule=Uneven())
    found = [runner.callback_metrics[f"own/{name}"].item() for name in ("mean", "prompts", "given")]
    assert found == pytest.approx([8 / 6, 17 / 5, 5 / 2], rel=1e-6)


# ---------------------------------------------------------------- a fit after one that was stopped


def test_a_trainer_that_was_stopped_validates_in_the_next_fit(micro_model_dir, tmp_path):
    class Stop(L.Callback):
        seen = ()

        def on_train_batch_end(self, trainer, pl_module, *_):
            trainer.should_stop = trainer.should_stop or pl_module.rollouts_done == 1

        def on_validation_end(self, trainer, pl_module):
            self.seen = (*self.seen, pl_module.rollouts_done)

    stop, module = Stop(), made(micro_model_dir, rollouts=4)
    runner = trainer(
        callbacks=[stop, RolloutCheckpoint(tmp_path, 1)], limit_val_batches=1.0, val_check_interval=3,
        check_val_every_n_epoch=None,
    )  # fmt: skip
    runner.fit(module, datamodule=Data())
    assert (module.rollouts_done, stop.seen, runner.limit_val_batches) == (1, (), 1.0)
    runner.fit(module, datamodule=Data())
    assert (module.rollouts_done, stop.seen) == (4, (3, 4))


# ---------------------------------------------------------------- settings that are replaced between two fits


def test_a_second_fit_measures_the_rewards_that_the_module_was_given_since(micro_model_dir):
    module = made(micro_model_dir, rollouts=1)
    runner = trainer(limit_val_batches=1)
    runner.fit(module, datamodule=Data())
    before = module.last_validation["val/reward"]
    module.rewards, module.max_rollouts = (
        RewardSet({"two": RewardSpec(lambda completions, **_: [2.0] * len(completions))}),
        2,
    )
    runner.fit(module, datamodule=Data())
    assert before < 1.0 and module.last_validation["val/reward"] == module.last_metrics["reward/mean"] == 2.0
    assert module.last_validation["val/accuracy"] == 1.0


def test_a_second_fit_clips_as_its_settings_say(micro_model_dir):
    """A step of SGD at rate 1 is then as long as the norm allows; the gradient is longer."""
    module = build_module(micro_model_dir, Settings(rollouts=1))
    trainer().fit(module, datamodule=Data())
    before, module.max_rollouts = weights(module), 2
    module.update_settings = replace(module.update_settings, max_grad_norm=1e-3)
    trainer().fit(module, datamodule=Data())
    assert module.last_metrics["grad_norm"] > 1e-2
    assert (weights(module) - before).norm().item() == pytest.approx(1e-3, rel=1e-4)


def test_a_reference_that_moves_from_a_second_fit_on_is_saved(micro_model_dir, tmp_path):
    slow = partial(torch.optim.SGD, lr=0.01)
    module = made(micro_model_dir, rollouts=1, objective={"beta": 0.1}, optimizer=slow)
    runner = trainer()
    runner.fit(module, datamodule=Data())
    module.update_settings = replace(module.update_settings, ref_sync_every_n_rollouts=1, ref_model_mixup_alpha=0.5)
    module.max_rollouts = 2
    runner.fit(module, datamodule=Data())
    runner.save_checkpoint(tmp_path / "x.ckpt")
    again = made(micro_model_dir, rollouts=2, objective={"beta": 0.1}, optimizer=slow)
    trainer().fit(again, datamodule=Data(), ckpt_path=tmp_path / "x.ckpt", weights_only=True)
    of = [torch.cat([p.flatten() for p in m.references[0].parameters()]) for m in (module, again)]
    assert torch.equal(*of) and not torch.equal(of[0], weights(module))


def test_a_reference_that_was_not_loaded_is_missed_before_the_first_rollout(micro_model_dir):
    module = made(micro_model_dir)
    module.configure_model()
    module.objective = replace(module.objective, beta=0.1)
    line = (
        "objective.beta: the reference is loaded with the policy, which was loaded for an objective without one; make "
        "the module with this objective"
    )
    with refused(line):
        trainer().fit(module, datamodule=Data())


class Sets(L.Callback):
    """Sets another objective as the second rollout begins."""

    def __init__(self, **changes):
        self.changes = changes

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if module.rollouts_done == 1:
            module.objective = replace(module.objective, **self.changes)


def test_an_objective_that_is_set_during_a_run_is_checked_and_then_used(micro_model_dir):
    """Its KL term needs a reference, which is loaded where the module was made with one, if only for later."""
    module = made(micro_model_dir, rollouts=3)
    with pytest.raises(UserError, match="^objective.beta: the reference is loaded with the policy"):
        trainer(callbacks=[Sets(beta=0.1)]).fit(module, datamodule=Data())
    assert module.rollouts_done == 1

    slow = partial(torch.optim.SGD, lr=1e-3)
    kept, changed = (
        made(micro_model_dir, rollouts=3, objective={"beta": 0.0, "beta_end": 0.1}, optimizer=slow) for _ in range(2)
    )
    trainer().fit(kept, datamodule=Data())
    trainer(callbacks=[Sets(beta=5.0)]).fit(changed, datamodule=Data())
    assert "kl/ref" in changed.last_metrics and not torch.equal(weights(kept), weights(changed))


def test_what_has_been_fitted_can_be_pickled(micro_model_dir):
    """With its Trainer, which a data module refers to."""
    module, data = made(micro_model_dir), Data()
    trainer(plugins=[]).fit(module, datamodule=data)
    again, of = pickle.loads(pickle.dumps((module, data)))
    assert torch.equal(weights(again), weights(module)) and of.trainer.optimizers
