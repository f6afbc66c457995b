"""An engine is closed when its run ends, so that the next job of a sweep finds the GPU and shared memory free."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from gspo_lightning import cli
from gspo_lightning.advantages import AdvantageEstimator
from gspo_lightning.errors import UserError
from gspo_lightning.rollout import closing_engine
from gspo_lightning.rollout import engine as engine_module
from gspo_lightning.rollout.gathered import GatheredEngine
from gspo_lightning.training.one_step_off import OneStepOff
from tests.conf.test_groups import given


class Holding:
    """Counts how often it was closed."""

    def __init__(self, closes=None):
        self.closed, self.closes = 0, closes

    def close(self):
        self.closed += 1
        if self.closes is not None:
            raise self.closes


WRAPPERS = {
    "none": lambda engine: engine,
    "one step off": OneStepOff,
    "gathered": lambda engine: GatheredEngine(engine, None),
    "both": lambda engine: GatheredEngine(OneStepOff(engine), None),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
def test_wrappers_close_what_they_wrap(wrap):
    engine = Holding()
    with closing_engine(wrap(engine)):
        assert engine.closed == 0
    assert engine.closed == 1
    with closing_engine(wrap(object())):
        pass  # one that holds nothing needs no close()


def test_a_wrapper_of_a_users_own_without_a_close_does_not_hide_that_of_its_engine():
    inner = SimpleNamespace(closed=0)
    inner.close = lambda: setattr(inner, "closed", inner.closed + 1)
    with closing_engine(SimpleNamespace(engine=SimpleNamespace(engine=inner))):
        assert inner.closed == 0
    assert inner.closed == 1


def test_what_ended_a_run_is_not_hidden_by_an_engine_that_does_not_close():
    with pytest.raises(UserError, match="the run's own"), closing_engine(Holding(RuntimeError("closing"))):
        raise UserError("the run's own")
    with pytest.raises(RuntimeError, match="closing"), closing_engine(Holding(RuntimeError("closing"))):
        pass


def test_one_of_several_ranks_that_fails_tells_the_others_before_anything_else(monkeypatch):
    monkeypatch.setattr(engine_module, "world_size", lambda: 2)
    engine = Holding()
    with pytest.raises(UserError), closing_engine(engine):
        raise UserError("on this rank")
    assert engine.closed == 0
    with closing_engine(engine):
        pass
    assert engine.closed == 1


@pytest.mark.parametrize("fails", [False, True], ids=["done", "failed"])
@pytest.mark.parametrize("work", [cli._train, cli._evaluate], ids=["train", "evaluate"])
def test_a_run_closes_its_engine_also_upon_an_error(work, fails, tmp_path, monkeypatch):
    order = []

    def execute(*_, **__):
        order.append("ran")
        if fails:
            raise UserError("lost")

    engine, rewards = Holding(), Holding()
    module = SimpleNamespace(
        engine=engine,
        rewards=rewards,
        advantages=AdvantageEstimator(),
        validator=SimpleNamespace(),
        last_validation={},
        validation_samples=[],
    )
    monkeypatch.setattr(cli, "build_module", lambda plain, rewards: module)
    monkeypatch.setattr(
        cli, "build_data", lambda plain, rewards: SimpleNamespace(rollouts_per_epoch=None, num_held_out=8)
    )
    trainer = SimpleNamespace(validate=execute, is_global_zero=False, global_rank=0, world_size=1)
    monkeypatch.setattr(cli, "build_trainer", lambda *_: trainer)
    monkeypatch.setattr(cli, "TrainingRun", lambda *_: SimpleNamespace(execute=execute, stopped=""))
    cfg = given("experiment=micro", run_dir=tmp_path / "run")
    if fails:
        with pytest.raises(UserError, match="lost"):
            work(cfg)
    else:
        work(cfg)
    assert (order, engine.closed, rewards.closed) == (["ran"], 1, 1)
