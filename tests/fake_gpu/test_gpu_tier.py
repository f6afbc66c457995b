"""The tests that need a GPU are run rarely: what they share is run here, on a CPU."""

from __future__ import annotations

import pytest

from tests.gpu import test_training
from tests.gpu.test_training import CASES, of_long_completions, train
from tests.scripted import update_of


@pytest.fixture
def _on_cpu(monkeypatch):
    monkeypatch.setitem(test_training.GPU, "accelerator", "cpu")


@pytest.mark.filterwarnings("ignore")
def test_whole_runs_of_the_gpu_tier_begin_and_end(tmp_path):
    short = [
        "trainer.accelerator=cpu",
        "max_rollouts=1",
        "validation.every_n_rollouts=null",
        "data.task.num_validation=2",
    ]
    weights = train(tmp_path, *CASES["FSDP2"], *short)
    assert weights and (tmp_path / "summary.json").is_file()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("strategy", ["auto", "ddp", "fsdp"])
def test_updates_of_the_gpu_tier_are_those_of_float64_here_too(strategy, micro_model_dir, _on_cpu):
    lora = test_training.LoraSettings(r=2)
    test_training.test_an_update_equals_that_of_a_cpu_in_float64(strategy, lora, micro_model_dir)


@pytest.mark.filterwarnings("ignore")
def test_rows_of_the_gpu_tier_are_trained_on_in_one_micro_batch_where_memory_suffices(micro_model_dir):
    settings, prompts = of_long_completions(30, generations=3)
    change, module = update_of(micro_model_dir, settings, prompts)
    assert change.any() and module.counts["oom_splits"] == 0
