"""What an export on a machine without torchvision says of images and videos is what the model came with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gspo_lightning.data.datamodule import PromptDataModule
from gspo_lightning.data.rows import RowsTask
from gspo_lightning.policy import processor
from gspo_lightning.policy.tiny_vlm import CHAT_TEMPLATE, SPECIAL_IDS, build_processor
from tests.vision.models import small_config

VIDEOS = {
    "video_processor_type": "Qwen3VLVideoProcessor", "size": {"longest_edge": 25_165_824, "shortest_edge": 4096},
    "fps": 2, "min_frames": 4, "patch_size": 16,
}  # fmt: skip


@pytest.fixture
def folder(smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Qwen2.5-VL without weights, on a machine without torchvision."""
    monkeypatch.setattr(processor, "is_torchvision_available", lambda: False)
    path = tmp_path / "model"
    small_config(SPECIAL_IDS).save_pretrained(path)
    build_processor(smollm2_dir, tmp_path).save_pretrained(path)
    return path


def exported(folder: Path, to: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The settings of images and those of videos, after reading and saving."""
    processor.load_processor(str(folder)).save_pretrained(to)
    return tuple(
        json.loads((to / name).read_text()) for name in ("processor_config.json", "video_preprocessor_config.json")
    )


def change(file: Path, **entries: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


def test_settings_of_videos_are_written_back(folder: Path, tmp_path: Path) -> None:
    (folder / "video_preprocessor_config.json").write_text(json.dumps(VIDEOS))
    assert exported(folder, tmp_path / "out")[1] == VIDEOS


def test_settings_of_videos_within_those_of_the_processor_are_written_back(folder: Path, tmp_path: Path) -> None:
    change(folder / "processor_config.json", video_processor=VIDEOS)
    assert exported(folder, tmp_path / "out")[1] == VIDEOS


def test_where_images_and_videos_share_a_file_it_is_that_of_both(folder: Path, tmp_path: Path) -> None:
    """As in the folders of the first Qwen2-VL."""
    (folder / "video_preprocessor_config.json").unlink()
    shared = {"patch_size": 14, "min_pixels": 3136, "max_pixels": 12_845_056}
    (folder / "preprocessor_config.json").write_text(json.dumps(shared))
    assert exported(folder, tmp_path / "out")[1] == {"video_processor_type": "Qwen2VLVideoProcessor", **shared}


def test_where_there_are_none_they_are_those_of_images(folder: Path, tmp_path: Path) -> None:
    (folder / "video_preprocessor_config.json").unlink()
    images, videos = exported(folder, tmp_path / "out")
    assert videos.pop("video_processor_type") == "Qwen2VLVideoProcessor"
    assert (videos["patch_size"], videos["merge_size"]) == (14, 2)
    assert videos.items() <= images["image_processor"].items()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [("qwen2_vl", "Qwen2VLProcessor"), ("qwen2_5_vl", "Qwen2_5_VLProcessor"), ("qwen3_vl_moe", "Qwen3VLProcessor")],
)
def test_an_export_names_the_class_of_the_model(folder: Path, tmp_path: Path, model_type: str, name: str) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert exported(folder, tmp_path / "out")[0]["processor_class"] == name


def test_a_chat_template_that_the_processor_alone_has_serves_rows_without_images(folder: Path) -> None:
    """As in a folder of LLaVA-NeXT."""
    (folder / "model.safetensors").touch()
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    task = RowsTask([{"prompt": f"say {n}"} for n in range(4)], num_validation=1)
    data = PromptDataModule(task, str(folder), prompts_per_rollout=2, max_prompt_length=64)
    data.check()
    assert data.tokenizer.chat_template == data.processor.chat_template == CHAT_TEMPLATE
