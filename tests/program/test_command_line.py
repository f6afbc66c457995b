"""Hydra's flags stand anywhere among the overrides, and a mistake in them is one line."""

from __future__ import annotations

import logging
import re
import shlex
import sys
from unittest.mock import Mock

import hydra
import pytest
import yaml
from hydra.core.global_hydra import GlobalHydra
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from gspo_lightning.config.groups import check_mode
from gspo_lightning.errors import UserError
from gspo_lightning.program import command_line, ending
from gspo_lightning.program.training_run import TrainingRun
from tests.command_line import ROOT, run


@pytest.mark.parametrize(
    ("line", "arranged"),
    [
        ("a=1 -cn x b=2", "a=1 b=2 -cn x"),
        ("a=1 --multi ~b +c=-1", "a=1 ~b +c=-1 --multi"),
        ("-c job a=1 --resolve -p model b=2", "a=1 b=2 -c job --resolve -p model"),
        ("--config-name=x a=1 -m a=1", "a=1 a=1 --config-name=x -m"),
        ("-cn a=1 a=1", "a=1 -cn a=1"),
        ("a=1 --info config b=2", "a=1 b=2 --info config"),
        ("a=1 --info", "a=1 --info"),
        ("-- a=1 -m", "a=1 -m"),
        ("a=1 --hydra-help", "--hydra-help"),
    ],
)
def test_overrides_come_first_and_flags_keep_their_values(line, arranged):
    read = command_line.read(line.split())
    assert (read.arguments, read.info) == (arranged.split(), "--info" in line)


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("a=1 --seed=1 b=2", "there is no flag --seed=1"),
        ("--experiment=micro a=1", "there is no flag --experiment=micro"),
        ("--experiment micro a=1", "there is no flag --experiment"),
        ("--experimental-rerun nowhere.pickle", "--experimental-rerun: there is no file nowhere.pickle"),
        ("a=1 -cn", "argument --config-name/-cn: expected one argument"),
        ("--resolve a=1", "--resolve goes only with --cfg or --help"),
        ("-m a=1 --cfg job", "--multirun and --cfg do not go together"),
    ],
)
def test_a_mistake_in_the_flags_is_one_line(line, mistake, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", *line.split()])
    with pytest.raises(SystemExit) as ended:
        ending.run(lambda: None)
    assert ended.value.code == 2
    told = f"error: command line: {mistake}; settings are written key=value, and --hydra-help shows the flags\n"
    assert capsys.readouterr() == ("", told)


@pytest.mark.parametrize(
    ("override", "line"),
    [
        (
            "experiment=micro,",
            "'experiment=micro,' cannot be read as key=value: mismatched input '<EOF>'; put a value with spaces, commas, "
            "brackets or quotes into quotes of its own: \"key='a, b'\"",
        ),
        ("=5", "'=5' names no key; settings are written key=value"),
        (
            "hydra.run.dir=",
            "hydra.run.dir= is empty, and files would go into the current folder; name a folder (. is this one)",
        ),
        ("reward.functions=[]", "Error merging override reward.functions=[]: Cannot merge DictConfig with ListConfig"),
    ],
)
def test_a_mistake_in_an_override_is_one_line_that_names_it(override, line, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=micro", override])
    with pytest.raises(SystemExit) as ended:
        ending.run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(print))
    GlobalHydra.instance().clear()
    assert (ended.value.code, capsys.readouterr()) == (2, ("", f"error: {line}\n"))


def test_info_is_shown(monkeypatch, capsys):
    monkeypatch.setattr(logging.root, "handlers", [])  # which Hydra sets for it, with the level
    monkeypatch.setattr(logging.root, "level", logging.root.level)
    monkeypatch.setattr(sys, "argv", ["train.py", "experiment=micro", "--info", "config", "seed=77"])
    ending.run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(print))
    GlobalHydra.instance().clear()
    assert "\nseed: 77\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (
            "data:\n\tseed: 1\n",
            "FILE: line 2: found character '\\t' that cannot start any token; correct this config file",
        ),
        ("seed: [\n", "FILE: line 2: expected the node content, but found '<stream end>'; correct this config file"),
        ("seed: 1\nseed: 2\n", "FILE: line 2: found duplicate key seed; correct this config file"),
        ("seed: '\xff'\n", "FILE: not UTF-8 text (invalid start byte at byte 7); correct this config file"),
        ("# @package\n", "FILE: Expected header format: KEY VALUE, got '@package'; correct this config file"),
        (
            "defaults: micro\n",
            "experiment/mine: Invalid defaults list in 'experiment/mine', defaults must be a list (got str); correct "
            "this config file",
        ),
        ("# @package _global_\nseed: ${nope\n", "no viable alternative at input '${nope' full_key: seed"),
    ],
)
def test_a_mistake_in_a_config_file_is_one_line_that_names_it(content, line, tmp_path, monkeypatch, capsys):
    file = tmp_path / "experiment" / "mine.yaml"
    file.parent.mkdir()
    file.write_bytes(content.encode("latin-1"))
    monkeypatch.setattr(sys, "argv", ["train.py", "--config-dir", str(tmp_path), "experiment=mine"])
    with pytest.raises(SystemExit) as ended:
        ending.run(hydra.main(version_base="1.3", config_path="pkg://gspo_lightning.conf", config_name="train")(print))
    GlobalHydra.instance().clear()
    told = f"error: {line}\n".replace("FILE", str(file.resolve()))
    assert (ended.value.code, capsys.readouterr()) == (2, ("", told))


def test_a_value_that_is_wrong_elsewhere_keeps_its_traceback(monkeypatch):
    def load_config(config_path):
        raise ValueError(f"{config_path} is of the user's own program")

    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(ValueError, match="own program"):
        ending.run(lambda: load_config("mine.yaml"))


@pytest.mark.parametrize(
    ("line", "mistake"),
    [
        ("hydra.sweep.dir=out seed=1", "hydra.sweep.dir=out has no effect on a single run"),
        ("+hydra.sweeper.params.seed=1", "+hydra.sweeper.params.seed=1 has no effect on a single run"),
        ("hydra/launcher=two_processes", "hydra/launcher=two_processes has no effect on a single run"),
        ("hparams_search=clip_optuna", "hparams_search=clip_optuna has no effect on a single run"),
        (
            "-m seed=1,2 hydra.run.dir=out",
            "hydra.run.dir has no effect on a sweep (-m), whose folder is hydra.sweep.dir",
        ),
        ("hydra.run.dir=out hparams_search=null", None),
        ("-m hydra.sweep.dir=out hparams_search=clip_optuna", None),
        ("-m hydra.run.dir=out 'hydra.sweep.dir=${hydra.run.dir}'", None),
        ("hydra.sweep.dir=out hydra.run.dir=out/3 hydra.job.num=3", None),  # a job in a program of its own
    ],
)
def test_what_hydra_reads_for_sweeps_alone_or_for_single_runs_alone_is_refused_elsewhere(line, mistake):
    read = command_line.read(shlex.split(line))
    if mistake is None:
        check_mode(read.overrides, is_sweep=read.multirun)
        return
    with pytest.raises(UserError, match=re.escape(mistake)):
        check_mode(read.overrides, is_sweep=read.multirun)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["hydra.sweep.dir=SWEEP"], "hydra.sweep.dir=SWEEP has no effect on a single run; add -m for a sweep, or leave it out"),
        (["-m", "hydra.run.dir=SWEEP"], "hydra.run.dir has no effect on a sweep (-m), whose folder is hydra.sweep.dir; set "),
    ],
)  # fmt: skip
def test_the_commands_refuse_it_and_leave_nothing(arguments, line, tmp_path):
    arguments = [argument.replace("SWEEP", str(tmp_path / "sweep")) for argument in arguments]
    done = run("experiment=micro", "dry_run=true", *arguments, cwd=tmp_path, expect=2)
    assert done.stderr.startswith(f"error: {line.replace('SWEEP', str(tmp_path / 'sweep'))}")
    assert done.stderr.count("\n") == 1 and not list(tmp_path.rglob("*.*"))


def test_an_override_that_refers_to_nothing_has_the_line_of_resolving_it(tmp_path):
    done = run("experiment=micro", "max_rollouts=${nothing}", cwd=tmp_path, expect=2)
    assert done.stderr == "error: config: Interpolation key 'nothing' not found full_key: max_rollouts\n"


def test_a_file_of_ones_own_that_hydra_passes_over_is_refused_where_it_is_chosen(tmp_path):
    for group, name, content in (
        ("reward", "letters", "combine: weighted_sum\n"),
        ("model", "micro", (ROOT / "conf" / "model" / "micro.yaml").read_text()),  # a copy, and so the same
        (".", "train", "seed: 1\n"),
    ):
        (tmp_path / "conf" / group).mkdir(parents=True, exist_ok=True)
        (tmp_path / "conf" / group / f"{name}.yaml").write_text(content)
    arguments = ["--config-dir", "conf", "experiment=micro", "dry_run=true"]
    done = run(*arguments, cwd=tmp_path, expect=2)
    assert done.stderr == (
        f"error: {tmp_path}/conf/reward/letters.yaml is not read: reward/letters.yaml is a name of ours, which goes "
        "first; give it another name, and choose that\n"
    )
    done = run(*arguments, "reward=exact_match", "data=micro_digit", cwd=tmp_path)
    assert f"{tmp_path}/conf/train.yaml is not read: train.yaml is a name of ours, which goes first; put" in done.stderr
    (tmp_path / "conf" / "train.yaml").unlink()
    (tmp_path / "conf" / "reward" / "letters.yaml").rename(tmp_path / "conf" / "reward" / "mine.yaml")
    assert not run(*arguments, cwd=tmp_path).stderr


def test_functions_of_two_choices_that_are_named_alike_do_not_take_the_place_of_each_other(tmp_path):
    (tmp_path / "conf" / "reward").mkdir(parents=True)
    letters = (ROOT / "conf" / "reward" / "letters.yaml").read_text()
    (tmp_path / "conf" / "reward" / "mine.yaml").write_text(letters.replace("letter_share:", "exact_match:"))
    arguments = ["--config-dir", "conf", "experiment=micro", "data=micro_digit", "dry_run=true"]
    (tmp_path / "conf" / "experiment").mkdir()
    both = "# @package _global_\ndefaults: [micro, {override /reward: [exact_match, mine]}]\n"
    (tmp_path / "conf" / "experiment" / "both.yaml").write_text(both)
    for given in ("reward=[exact_match,mine]", "experiment=both"):
        done = run(*arguments, given, cwd=tmp_path, expect=2)
        assert done.stderr == (
            "error: reward/exact_match and reward/mine both have a function exact_match, of which only that of "
            "reward/mine would be left; rename one\n"
        )
    changed = "defaults: [exact_match, soft_overlong, _self_]\nfunctions: {exact_match: {weight: 0.5}}\n"
    (tmp_path / "conf" / "reward" / "changed.yaml").write_text(changed)
    assert not run(*arguments, "reward=changed", cwd=tmp_path).stderr
    further = f"defaults: [soft_overlong, _self_]\n{letters.replace('letter_share:', 'exact_match:')}"
    (tmp_path / "conf" / "reward" / "further.yaml").write_text(further)
    done = run(*arguments, "reward=[exact_match,further]", cwd=tmp_path, expect=2)
    assert "reward/exact_match and reward/further both have a function exact_match" in done.stderr
    assert not run(*arguments, "reward=[exact_match,soft_overlong]", cwd=tmp_path).stderr


def test_an_estimator_of_ones_own_that_contradicts_the_rewards_is_refused_before_a_model_is_loaded(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from gspo_lightning.advantages import AdvantageEstimator\n"
        "class Own(AdvantageEstimator):\n"
        "    def __call__(self, rewards):\n"
        "        return rewards - rewards.mean(1, keepdim=True)\n"
    )
    own = ["experiment=micro", "advantages._target_=mine.Own", "~advantages.scale_rewards", "~advantages.baseline"]
    done = run(*own, "reward.combine=normalize_then_sum", "dry_run=true", cwd=tmp_path, expect=2)
    assert "contradicts advantages.scale_rewards=group" in done.stderr and "parameters" not in done.stdout


def test_what_code_of_a_user_raises_is_told_below_the_traceback_with_its_place(tmp_path):
    (tmp_path / "site-packages").mkdir()  # such as that of `pip install --user`
    (tmp_path / "site-packages" / "lib.py").write_text("import json\nread = lambda text: json.loads(text)\n")
    (tmp_path / "mine.py").write_text(
        "import sys; sys.path.append('site-packages'); import lib\n"
        "from gspo_lightning.rollout import TransformersEngine\n"
        "class Own(TransformersEngine):\n"
        "    def generate(self, *arguments):\n"
        "        return lib.read('no json')\n"
    )
    arguments = ["experiment=micro", "print_config=false", "rollout.engine._target_=mine.Own", "hydra.run.dir=run"]
    done = run(*arguments, cwd=tmp_path, expect=1)
    *above, last = done.stderr.splitlines()
    assert "Traceback (most recent call last):" in above
    assert last == ("error: Own.generate (mine.py:5) raised JSONDecodeError: Expecting value: line 1 column 1 (char 0)")
    with (tmp_path / "mine.py").open("a") as file:
        file.write(
            "class Later(Own):\n"
            "    calls = 0\n"
            "    def generate(self, *arguments):\n"
            "        Later.calls += 1\n"
            "        return super().generate(*arguments) if Later.calls == 6 else TransformersEngine.generate(self, *arguments)\n"
        )
    arguments[2:] = ["rollout.engine._target_=mine.Later", "hydra.run.dir=run", "checkpoint.every_n_rollouts=1"]
    told = run(*arguments, cwd=tmp_path, expect=1).stderr.splitlines()[-1]
    assert told == f"{last}; mend it and resume with ckpt_path={tmp_path / 'run' / 'checkpoints' / 'last.ckpt'}"


def test_what_a_logger_of_lightning_raises_is_one_line(tmp_path):
    """As W&B does where nobody is logged in, in the middle of Lightning."""
    none = ["logger=csv", "+logger.csv.flush_logs_every_n_steps=0"]
    done = run("experiment=micro", "print_config=false", *none, f"hydra.run.dir={tmp_path / 'run'}", expect=2)
    assert done.stderr.splitlines()[-1].startswith("error: logger: CSVLogger raised ZeroDivisionError: ")
    assert done.stderr.endswith("; mend it, or leave that logger out\n") and "Traceback" not in done.stderr


def test_a_logger_that_fails_during_a_run_ends_it_with_the_way_to_go_on(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from lightning.pytorch.loggers import CSVLogger\n"
        "class Full(CSVLogger):\n"
        "    def log_metrics(self, metrics, step=None):\n"
        "        self._flush_logs_every_n_steps = int(step < 20)\n"
        "        super().log_metrics(metrics, step)\n"
    )
    own = ["logger=csv", "logger.csv._target_=mine.Full", "checkpoint.every_n_rollouts=1", "hydra.run.dir=run"]
    done = run("experiment=micro", "print_config=false", *own, cwd=tmp_path, expect=2)
    last = tmp_path / "run" / "checkpoints" / "last.ckpt"
    assert last.is_file()
    assert done.stderr.splitlines()[-1].endswith(
        f"; mend it, or leave that logger out and resume with ckpt_path={last}"
    )


def test_every_logger_gets_the_config_as_hyperparameters(tmp_path):
    """As the run's folder does; and TensorBoard no curve of Lightning's that says nothing."""
    folder = tmp_path / "run"
    run("experiment=micro", "print_config=false", "max_rollouts=1", "export.enabled=false", "logger=[csv,tensorboard]",
        f"hydra.run.dir={folder}")  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert config["objective"]["loss_type"] == "grpo"
    for file in ("csv/version_0/hparams.yaml", "tensorboard/hparams.yaml"):
        assert yaml.unsafe_load((folder / file).read_text()) == config
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    assert "reward/mean" in events.Tags()["scalars"] and "hp_metric" not in events.Tags()["scalars"]


def test_a_run_of_mlflow_that_goes_on_keeps_its_hyperparameters(tmp_path):
    """It would refuse those that have changed, such as ckpt_path."""
    training = TrainingRun.__new__(TrainingRun)
    training.plain = {"logger": {"csv": {"name": "x"}, "off": None, "mlflow": {"run_id": "1"}}}
    training.run_dir = tmp_path
    training.trainer = Mock(loggers=[Mock(), Mock()])
    training._write_config()
    assert [logger.log_hyperparams.call_count for logger in training.trainer.loggers] == [1, 0]


def test_what_a_profiler_or_a_callback_of_lightning_has_to_say_is_printed(tmp_path):
    """It is logged, at a level at which everything else of Lightning is left out."""
    done = run("experiment=micro", "print_config=false", "max_rollouts=1", "export.enabled=false", "logger=none",
        "+trainer.profiler=simple", "+callbacks.summary._target_=lightning.pytorch.callbacks.ModelSummary",
        f"hydra.run.dir={tmp_path / 'run'}")  # fmt: skip
    told = done.stdout + done.stderr
    assert "FIT Profiler Report" in told and "run_training_batch" in told and "Trainable params" in told
