"""Settings with which a run would train, measure or keep nothing are refused, or said where that is allowed."""

from __future__ import annotations

import errno
import logging
import os
import sys
import warnings
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra

from gspo_lightning import cli
from gspo_lightning.callbacks import files
from gspo_lightning.config import checks
from gspo_lightning.config.build import build, build_data
from gspo_lightning.config.effects import check_environment_reward, check_held_out, check_tasks
from gspo_lightning.errors import UserError
from gspo_lightning.rewards import ForTasks, MatmulReward, RewardSet, RewardSpec
from tests.conf.test_groups import resolved

MICRO = "experiment=micro"


@pytest.mark.parametrize(
    ("change", "line"),
    [
        ("optimizer.lr=0", "optimizer.lr=0 trains nothing: no weight changes"),
        ("reward.functions.letter_share.weight=0", "the weight of letter_share is 0, so that all completions"),
    ],
)
def test_what_trains_nothing_is_refused_in_training_alone_and_a_warning_where_that_is_allowed(change, line):
    with pytest.raises(UserError, match=rf"{line}.*\(allow_no_effect=true turns this into a warning\)$"):
        checks.check(resolved(MICRO, change))
    checks.check(resolved(MICRO, change), training=False)
    with pytest.warns(UserWarning, match=line):
        checks.check(resolved(MICRO, change, "allow_no_effect=true"))


def test_one_weight_of_0_beside_another_only_records_and_an_environment_may_reward_turns():
    checks.check(resolved(MICRO, "reward=[letters,soft_overlong]", "reward.functions.letter_share.weight=0"))
    none = ["experiment=guessing_game", "reward.functions.environment.weight=0"]
    checks.check(resolved(*none, "trainer.precision=32-true"))


@pytest.mark.parametrize(("every", "rollouts", "warns"), [(2, 3, False), (3, 3, True), (9, 3, True)])
def test_a_best_checkpoint_among_one_is_said(every, rollouts, warns):
    best = ["checkpoint.keep_best=val/reward", f"validation.every_n_rollouts={every}", f"max_rollouts={rollouts}"]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        check_held_out(resolved(MICRO, *best), 8, training=True)
    assert [str(w.message) for w in said] == [
        f"checkpoint.keep_best=val/reward chooses among one: with validation.every_n_rollouts={every} the only "
        "validation of 3 rollouts is the last, and best.ckpt will be last.ckpt"
    ] * warns


@pytest.mark.filterwarnings("default")
def test_lines_of_libraries_about_what_is_ours_or_not_there_are_not_shown(caplog):
    with warnings.catch_warnings(record=True) as said:
        cli._quieten()
        warnings.warn("You have passed exclude_modules=.*gate.* but no modules were excluded.", stacklevel=1)
        warnings.warn("The ``compute`` method of metric MeanMetric was called before the ``update``", stacklevel=1)
        warnings.warn("another", stacklevel=1)
    logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward")
    assert [str(w.message) for w in said] == ["another"] and not caplog.records


def test_training_without_held_out_rows_is_allowed():
    check_held_out(resolved(MICRO), 0, training=True)


def measured(environment_reward, completions):
    """A reward function; the reward of the environment decides."""
    return environment_reward


def graded(completions, environment_reward=None):
    """The same, if there is one."""
    return [0.0] * len(completions)


@pytest.mark.parametrize("wrapped", [False, True], ids=["plain", "for a task"])
@pytest.mark.parametrize(("name", "refused"), [("measured", True), ("graded", False)])
def test_a_function_that_needs_an_environment_is_refused_without_one(name, refused, wrapped):
    function = {"_target_": "hydra.utils.get_method", "path": f"{__name__}.{name}"}
    if wrapped:
        function = {"_target_": "gspo_lightning.rewards.ForTasks", "function": function, "tasks": ["a"]}
    spec = {"_target_": "gspo_lightning.rewards.RewardSpec", "function": function}
    rewards = build({"_target_": "gspo_lightning.rewards.RewardSet", "functions": {"mine": spec}})
    check_environment_reward({"environment": {"_target_": "x"}}, rewards)
    if not refused:
        check_environment_reward({"environment": None}, rewards)
        return
    named = RewardSet(
        {"mine": RewardSpec(MatmulReward(function="product", sandbox="unsafe"))}
    )  # a name, not a function
    check_environment_reward({"environment": None}, named)
    with pytest.raises(UserError, match=r"^reward.functions.mine: its parameter environment_reward .* there is none"):
        check_environment_reward({"environment": None}, rewards)


def test_a_task_that_the_mixture_does_not_have_is_refused_or_warned_of():
    """Its rows would be judged by the other functions alone, without a word."""
    mixture = ["data=mixture", "reward=[by_task,soft_overlong]", "reward.functions.sums.function.tasks=[sum,largest]"]
    line = "reward.functions.sums: ForTasks has no effect for sum: the tasks of the mixture are largest, sums"

    def data(*overrides):
        plain = resolved(*mixture, *overrides)
        return build_data(plain, build(plain["reward"]))

    with pytest.raises(UserError, match=rf"^{line} \(allow_no_effect=true turns this into a warning\)$"):
        data()
    with pytest.warns(UserWarning, match=f"^{line}$"):
        assert data("allow_no_effect=true").task_names == ("largest", "sums")
    some = RewardSet({"some": RewardSpec(ForTasks(MatmulReward(sandbox="unsafe"), ["of a column of a file"]))})
    check_tasks({"allow_no_effect": False}, some, ())


def evaluated(folder: Path, monkeypatch: pytest.MonkeyPatch, *overrides: str) -> int:
    """The exit code of `evaluate.py`."""
    monkeypatch.setattr(
        sys, "argv", ["evaluate.py", MICRO, "print_config=false", f"hydra.run.dir={folder}", *overrides]
    )
    with pytest.raises(SystemExit) as ended:
        cli.evaluate_main()
    GlobalHydra.instance().clear()
    return int(str(ended.value.code))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ("data.task.num_validation=0", "there are no held-out rows; raise data.task.num_validation"),
        ("+trainer.limit_val_batches=0", "trainer.limit_val_batches=0; remove it"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_of_nothing_is_refused(change, why, tmp_path, monkeypatch, capsys):
    assert evaluated(tmp_path / "out", monkeypatch, change) == 2
    assert capsys.readouterr().err == f"error: nothing to measure: {why}\n"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["held_out.jsonl", "evaluation.json"])
@pytest.mark.filterwarnings("ignore")
def test_an_evaluation_that_fills_the_disk_ends_in_one_line_and_leaves_no_part_of_a_file(
    name, tmp_path, monkeypatch, capsys
):
    class Full(type(tmp_path)):
        def write_bytes(self, content: bytes) -> int:
            super().write_bytes(content[:9])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self))

    folder = tmp_path / "out"
    monkeypatch.setattr(
        "gspo_lightning.program.evaluation.replace_file",
        lambda path, text: files.replace_file(Full(path) if path.name == name else path, text),
    )
    assert evaluated(folder, monkeypatch) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line == (
        f"error: cannot write {folder}/.{name}.tmp (No space left on device); free some space, or choose another "
        "folder (hydra.run.dir)"
    )
    assert [path.name for path in folder.glob("*")] == ["held_out.jsonl"] * (name == "evaluation.json")
