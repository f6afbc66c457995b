"""The image processor of a model, with or without torchvision.

transformers builds no processor with a video half on a machine without torchvision. `ImageTextProcessor` replaces it
there: the same text half, the PIL image processor (pixels within 0.015 of torchvision's), no videos. What it saves
names the model's own processor class and has its video settings, so a machine with torchvision loads that class.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoProcessor, AutoTokenizer, AutoVideoProcessor, Qwen2_5_VLProcessor
from transformers.image_processing_utils import BaseImageProcessor
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.processing_utils import ProcessorMixin
from transformers.utils import is_torchvision_available
from transformers.video_processing_utils import BaseVideoProcessor

from gspo_lightning.errors import UserError
from gspo_lightning.policy.reading import refuse_own_code
from gspo_lightning.policy.vision import FAMILIES

_SPECIAL = {
    "image_token": "<|image_pad|>",
    "video_token": "<|video_pad|>",
    "vision_start_token": "<|vision_start|>",
    "vision_end_token": "<|vision_end|>",
}


class ImageTextProcessor(Qwen2_5_VLProcessor):
    """The processor of the Qwen-VL families without its video half."""

    own_class = "Qwen2_5_VLProcessor"
    """The class that transformers has for the model, named in what is saved."""
    video_settings: Mapping[str, Any] | None = None
    """Video settings of the folder that this was read from, only to be saved again; None if there were none."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: str | None = None) -> None:
        for name, token in _SPECIAL.items():
            setattr(self, name, token)
            setattr(self, f"{name}_id", tokenizer.convert_tokens_to_ids(token))
        self.video_processor = None
        ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)

    @classmethod
    def get_attributes(cls) -> list[str]:
        """The parts that are saved and loaded."""
        return ["image_processor", "tokenizer"]

    def save_pretrained(self, folder: Any, **kwargs: Any) -> list[str]:
        """Saves the parts, the name of the class that transformers has for the model, and video settings."""
        saved = super().save_pretrained(folder, **kwargs)
        third = self.image_processor.patch_size == 16
        videos = {
            "video_processor_type": "Qwen3VLVideoProcessor" if third else "Qwen2VLVideoProcessor",
            **(self.video_settings or self._settings_like_images()),
        }
        target = Path(folder) / "video_preprocessor_config.json"
        target.write_text(json.dumps(videos, indent=2) + "\n", encoding="utf-8")
        for file in (Path(folder) / "processor_config.json", Path(folder) / "tokenizer_config.json"):
            if file.is_file():
                content = json.loads(file.read_text(encoding="utf-8"))
                if "processor_class" in content:
                    content |= {"processor_class": self.own_class}
                    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        return list(saved or [])

    def _settings_like_images(self) -> dict[str, Any]:
        """Video settings made from those of images: with torchvision, the model's class does not load without any."""
        keys = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std")
        return {key: getattr(self.image_processor, key) for key in keys}


@lru_cache(maxsize=4)
def load_processor(path: str) -> Any:
    """The processor in a model folder (or on the hub).

    Raises:
        UserError: there is none, or it needs a package that is not installed.
    """
    model_type = AutoConfig.from_pretrained(path, trust_remote_code=False).model_type
    try:
        if model_type in FAMILIES and not _has_video_half(path):
            return _without_videos(path, model_type)
        return AutoProcessor.from_pretrained(path, trust_remote_code=False)
    except ImportError as error:
        why = str(error).strip().splitlines()[0]
        raise UserError(f"model {path!r}: its processor cannot be used here ({why}); install what it needs") from error
    except (OSError, ValueError) as error:
        refuse_own_code(path, "the processor", error)
        raise UserError(
            f"model {path!r} reads images but has no image processor (preprocessor_config.json or "
            f"processor_config.json): copy it from where the model came from"
        ) from error


def _without_videos(path: str, model_type: str) -> ImageTextProcessor:
    images: BaseImageProcessor = Qwen2VLImageProcessorPil.from_pretrained(path)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    template = tokenizer.chat_template or ProcessorMixin.get_processor_dict(path)[0].get("chat_template")
    processor = ImageTextProcessor(images, tokenizer, chat_template=template)
    processor.own_class = PROCESSOR_MAPPING_NAMES[model_type]
    with suppress(OSError):  # the folder has none
        processor.video_settings = BaseVideoProcessor.get_video_processor_dict(path)[0]
    return processor


def _has_video_half(path: str) -> bool:
    """Whether the model has a video processor and the library that it needs is installed."""
    if not is_torchvision_available():
        return False
    try:
        AutoVideoProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError):
        return False
    return True
