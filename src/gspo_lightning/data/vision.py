"""From a conversation with pictures to token ids and vision inputs, by the model's own processor."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor

from gspo_lightning.data.images import Picture, load_image
from gspo_lightning.errors import UserError
from gspo_lightning.types import Messages


@dataclass(frozen=True)
class VisionSettings:
    """Limits on pictures; None leaves the processor's own. A picture is resized to lie between them."""

    min_pixels: int | None = None
    max_pixels: int | None = None

    @property
    def is_set(self) -> bool:
        """Whether anything differs from the processor's own."""
        return self.min_pixels is not None or self.max_pixels is not None

    def size(self, processor: Any) -> dict[str, int]:
        """What the image processor takes as ``size``."""
        own = processor.image_processor.size
        return {
            "shortest_edge": own["shortest_edge"] if self.min_pixels is None else self.min_pixels,
            "longest_edge": own["longest_edge"] if self.max_pixels is None else self.max_pixels,
        }


def image_parts(prompt: str | Messages) -> list[dict[str, Any]]:
    """The parts of a conversation that are pictures or videos, in order."""
    if isinstance(prompt, str):
        return []
    return [
        part
        for message in prompt
        if not isinstance(message.get("content"), str)
        for part in message.get("content") or []
        if part.get("type") in ("image", "video")
    ]


def last_text(prompt: str | Messages) -> str:
    """What a prompt says, for people: a plain prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    content = prompt[-1]["content"]
    if isinstance(content, str):
        return content
    return "".join(part["text"] for part in content if part.get("type") == "text")


def encode_conversation(
    messages: Messages, processor: Any, settings: VisionSettings, template_kwargs: dict[str, Any], where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(P,)`` token ids and the vision inputs of `gspo_lightning.types.Prompt`.

    Raises:
        UserError: a picture cannot be read, or placeholders and pictures do not match; names the row.
    """
    parts = image_parts(messages)
    if any(part["type"] == "video" for part in parts):
        _refuse_video(processor, where)
    pictures = [load_image(part.get("image"), f"{where}, image {n}") for n, part in enumerate(parts)]
    try:
        text = processor.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=False, **template_kwargs
        )
    except TemplateError as error:
        raise UserError(f"{where}: the model's chat template refuses the prompt: {error}") from error
    placeholders = text.count(processor.image_token)
    if placeholders != len(pictures):
        raise UserError(
            f"{where}: {placeholders} image placeholders for {len(pictures)} images; give one image for each, and do "
            f"not write {processor.image_token} in the text"
        )
    return _run(processor, text, pictures, settings, where)


def _run(
    processor: Any, text: str, pictures: list[Picture], settings: VisionSettings, where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    kwargs: dict[str, Any] = {"size": settings.size(processor)} if settings.is_set else {}
    try:
        output = processor(text=[text], images=pictures, return_tensors="pt", **kwargs)
    except ValueError as error:  # such as an aspect ratio that no grid of patches has
        raise UserError(f"{where}: the image processor refuses an image ({error})") from error
    ids, types = output["input_ids"][0], torch.as_tensor(output["mm_token_type_ids"])[0]
    merged = int(output["image_grid_thw"].prod(dim=1).sum()) // processor.image_processor.merge_size**2
    tokens = int((types == 1).sum())
    if tokens != merged:
        raise UserError(f"{where}: {tokens} image tokens for {merged} image features; shorten nothing by hand")
    names = ("pixel_values", "image_grid_thw")
    return ids, {**{name: output[name] for name in names}, "mm_token_type_ids": types}


def _refuse_video(processor: Any, where: str) -> None:
    missing = getattr(processor, "video_processor", None) is None
    why = "needs torchvision, which is not installed here" if missing else "is not read by this data module yet"
    raise UserError(f"{where}: the prompt has a video, which {why}; give frames as images")
