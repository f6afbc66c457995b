"""`python train.py` on images: the whole way from rows with image columns to a report that shows them."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from gspo_lightning.policy.tiny_vlm import SPECIAL_IDS, build_processor
from tests.command_line import assert_equal_up_to_order, run
from tests.vision.models import small_config


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory, smollm2_dir):
    """A random Qwen2.5-VL of two small layers with SmolLM2's tokenizer."""
    folder = tmp_path_factory.mktemp("vlm")
    model = Qwen2_5_VLForConditionalGeneration(small_config(SPECIAL_IDS))
    model.generation_config.eos_token_id = 2
    model.save_pretrained(folder)
    build_processor(smollm2_dir, tmp_path_factory.mktemp("scratch")).save_pretrained(folder)
    return folder


@pytest.fixture
def rows(tmp_path):
    """Rows with one image, two images and none (a file of its own has one image missing)."""
    lines = []
    for number in range(8):
        path = tmp_path / f"{number}.png"
        Image.new("RGB", (30 + 10 * number, 40), (30 * number, 0, 0)).save(path)
        images = [str(path)] if number % 3 else [str(path), str(path)]
        content = [{"type": "image", "image": image} for image in images] if number != 4 else []
        content.append({"type": "text", "text": f"colour {number}?"})
        lines.append({"prompt": [{"role": "user", "content": content}], "letter": "e"})
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


def arguments(model_dir, rows, folder):
    return [
        "model=tiny_vlm", f"model.path={model_dir}", "data=rows", f"data.task.source={rows}", "data.task.num_validation=3",
        "reward=letters", "data.prompts_per_rollout=4", "rollout.num_generations=4", "rollout.max_completion_length=6",
        "max_rollouts=2", "update.num_minibatches=2", "logger=none", "trainer.precision=32-true",
        f"hydra.run.dir={folder}",
    ]  # fmt: skip


@pytest.mark.parametrize("train_vision", [False, True])
def test_a_run_on_rows_with_one_two_and_no_images_reports_and_exports(model_dir, rows, tmp_path, train_vision):
    out = tmp_path / "out"
    limits = ["data.max_pixels=2352"] if train_vision else []
    run(*arguments(model_dir, rows, out), f"model.train_vision={train_vision}", *limits)
    report = (out / "report.html").read_text()
    shown = [
        len(sample.get("images", [])) for sample in json.loads((out / "validation_before.json").read_text())["samples"]
    ]
    assert report.count('src="data:image/png;base64,') == sum(shown) > 0
    exported = AutoModelForImageTextToText.from_pretrained(out / "model").state_dict()
    start = AutoModelForImageTextToText.from_pretrained(model_dir).state_dict()
    changed = {name for name, value in exported.items() if not torch.equal(value, start[name])}
    assert any("language_model" in name for name in changed)
    assert any("visual" in name for name in changed) == train_vision
    # Others see images as training did: of at most max_pixels, and then at least one merged patch.
    processor = json.loads((out / "model" / "processor_config.json").read_text())["image_processor"]
    least, most = (28 * 28, 2352) if train_vision else (7056, 7056)
    assert processor["size"] == {"shortest_edge": least, "longest_edge": most}


def test_a_missing_image_stops_the_run_before_the_model_and_names_the_row(model_dir, rows, tmp_path):
    (tmp_path / "5.png").unlink()
    done = run(*arguments(model_dir, rows, tmp_path / "out"), expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: row rows:") and "there is no image" in line and "5.png" in line


@pytest.mark.parametrize("experiment", ["gspo_qwen_vl", "gspo_qwen_vl_3b", "gspo_qwen3_vl"])
def test_the_recipes_stop_without_a_gpu_in_one_line_that_names_the_offline_variant(experiment, tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = run(f"experiment={experiment}", f"hydra.run.dir={tmp_path / 'out'}", expect=2)
    (line,) = done.stderr.strip().splitlines()
    assert "GPU" in line and "experiment=gspo_qwen_vl_tiny" in line


@pytest.mark.slow
def test_a_policy_split_over_two_ranks_samples_and_learns_what_a_whole_one_does(model_dir, rows, tmp_path):
    """One rank's prompts have two images where the other's have one, or none."""
    one, two = tmp_path / "one", tmp_path / "two"
    wide = ["model.dtype=float64", "validation.every_n_rollouts=null"]
    for folder, more in ((one, []), (two, ["trainer=fsdp", "trainer.accelerator=cpu"])):
        run(*arguments(model_dir, rows, folder), *wide, *more)
    assert_equal_up_to_order(two, one)
