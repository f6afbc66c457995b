"""Folders of images: subfolders that name the answers, or a file of questions beside the images."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from gspo_lightning.config.build import build
from gspo_lightning.data.vision import image_parts
from tests.conf.test_groups import composed


@pytest.fixture(autouse=True)
def offline(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


def task(folder, *overrides):
    from omegaconf import OmegaConf

    cfg = composed("data=image_folder", f"data.task.source={folder}", "data.task.num_validation=2", *overrides)
    return build(OmegaConf.to_container(cfg.data.task, resolve=True))


def test_the_name_of_the_subfolder_is_the_answer(tmp_path):
    colours = {"red": (255, 0, 0), "blue": (0, 0, 255)}
    for name, colour in colours.items():
        (tmp_path / "images" / name).mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (30 + number, 30), colour).save(tmp_path / "images" / name / f"{number}.png")
    made = task(tmp_path / "images")
    rows = [made.train_row(i) for i in range(made.num_train_rows)] + made.validation_rows()
    assert len(rows) == 8 and made.num_train_rows == 6
    for row in rows:
        (part,) = image_parts(row["prompt"])
        assert row["prompt"][-1]["content"][-1]["text"] == "What is in the image? Answer with one word."
        from gspo_lightning.data.images import load_image

        assert load_image(part["image"], "row").getpixel((3, 3)) == colours[row["answer"]]


def test_a_file_beside_the_images_has_questions_of_their_own(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    lines = []
    for number in range(5):
        Image.new("RGB", (30, 30), (10 * number, 0, 0)).save(folder / f"{number}.png")
        lines.append({"file_name": f"{number}.png", "question": f"Which is {number}?", "answer": str(number)})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    made = task(folder, "data.task.template='{question}'", "~data.task.columns.answer")
    rows = [made.train_row(i) for i in range(made.num_train_rows)] + made.validation_rows()
    assert sorted((r["prompt"][-1]["content"][-1]["text"], r["answer"]) for r in rows) == [
        (f"Which is {n}?", str(n)) for n in range(5)
    ]
