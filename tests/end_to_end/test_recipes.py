"""Recipes that need a hub and a GPU, from local files on a CPU and with a small model in place of theirs."""

from __future__ import annotations

import json

from tests.command_line import rows, run


def test_gsm8k_from_local_files(micro_model_dir, tmp_path):
    """The README's recipe with the overrides that its config names."""
    for split, count in (("train", 12), ("test", 3)):
        lines = [
            {"question": f"What is {n} times a thousand?", "answer": f"Easy.\n#### {n},000"}
            for n in range(1, count + 1)
        ]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run(
        "experiment=gspo_gsm8k", f"model.path={micro_model_dir}", f"data.task.source={tmp_path / 'train.jsonl'}",
        "data.task.config_name=null", f"data.task.validation_split={tmp_path / 'test.jsonl'}",
        "trainer.accelerator=cpu", "trainer.precision=32-true", "max_rollouts=2", "data.prompts_per_rollout=4",
        "rollout.max_completion_length=8", f"hydra.run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    seen = [json.loads(line) for line in (tmp_path / "run" / "completions.jsonl").open()]
    prompts = {entry["prompt"][0]["content"] for entry in seen}
    assert len(seen) == 2 * 4 * 5 and len(prompts) == 8
    assert all(p.startswith("What is ") and "a number, at the very end" in p for p in prompts)
    held_out = json.loads((tmp_path / "run" / "validation_before.json").read_text())
    assert sorted(sample["answer"] for sample in held_out["samples"]) == ["1,000", "2,000", "3,000"]
    assert len([row for row in rows(tmp_path / "run") if row["val/accuracy"]]) == 2
