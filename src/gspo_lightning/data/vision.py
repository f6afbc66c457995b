"""Converts a conversation with images or videos to token ids and vision inputs with the model's own processor."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from PIL.Image import Resampling
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.video_utils import VideoMetadata

from gspo_lightning.data.columns import parts_of
from gspo_lightning.data.images import PILImage, load_image
from gspo_lightning.data.templating import has_added_eos, refuse_surrogates
from gspo_lightning.data.videos import Video, load_video
from gspo_lightning.dialogue.template import REFUSALS
from gspo_lightning.errors import UserError
from gspo_lightning.rewards.functions import is_missing
from gspo_lightning.screen import counted
from gspo_lightning.types import Messages


@dataclass(frozen=True)
class VisionSettings:
    """Limits on the pixels of images, which are resized to meet them; None leaves the processor's own limit.

    Raises:
        UserError: a limit is no whole number above 0, or the minimum is above the maximum.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None

    def __post_init__(self) -> None:
        for key, value in (("min_pixels", self.min_pixels), ("max_pixels", self.max_pixels)):
            if value is not None and (type(value) is not int or value < 1):
                raise UserError(f"data.{key}={value!r} must be a whole number above 0, or null")
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise UserError(
                f"data.min_pixels={self.min_pixels} is above data.max_pixels={self.max_pixels}; no image size lies "
                "between them"
            )

    @property
    def is_set(self) -> bool:
        """Whether any limit is set."""
        return self.min_pixels is not None or self.max_pixels is not None

    def size(self, processor: Any, frames: int = 1) -> dict[str, int]:
        """The ``size`` argument of an image or video processor for each image or frame.

        If only one limit is set and the processor's other one is too near to it, that one is adjusted: images are
        enlarged to whole patches, rounded up, which must not exceed the maximum.

        Args:
            processor: has the limits that are not set, and the patch size.
            frames: of a video, for a processor whose limits are those of a whole video (Qwen3-VL).

        Raises:
            UserError: the processor does not count pixels.
        """
        own, patch = processor.size, getattr(processor, "merge_size", None)
        # Other processors with these two keys mean edges (Idefics2).
        if patch is None or "longest_edge" not in own or "shortest_edge" not in own:
            raise UserError(
                f"data.min_pixels and data.max_pixels have no effect: {type(processor).__name__} uses fixed image "
                "sizes and does not count pixels; remove them"
            )
        least, most = own["shortest_edge"] // frames, own["longest_edge"] // frames
        if self.max_pixels is not None:
            most = self.max_pixels
            least = least if 4 * least <= most else (processor.patch_size * patch) ** 2
        if self.min_pixels is not None:
            least, most = self.min_pixels, max(most, self.min_pixels)
        return {"shortest_edge": least, "longest_edge": most}


def image_parts(prompt: str | Messages) -> list[dict[str, Any]]:
    """The parts of a conversation that are images or videos, in order."""
    if isinstance(prompt, str):
        return []
    return [part for message in prompt for part in parts_of(message) if part["type"] in ("image", "video")]


def image_of(part: Mapping[str, Any]) -> Any:
    """The image of an image part, or the first frame of a video part, for a page; None if it is a video file."""
    if part["type"] == "image":
        return part.get("image")
    video = part.get("video")
    return video[0] if isinstance(video, list | tuple) and video else None


def last_text(prompt: str | Messages) -> str:
    """The text of a prompt to show to people: a plain prompt, or the text of the last message."""
    if isinstance(prompt, str):
        return prompt
    if not (parts := parts_of(prompt[-1])):
        return str(prompt[-1]["content"])
    return "".join(str(part.get("text", "")) for part in parts if part["type"] == "text")


def encode_conversation(
    messages: Messages, processor: Any, settings: VisionSettings, template_kwargs: dict[str, Any], where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """``(P,)`` token ids and the vision inputs of `gspo_lightning.types.Prompt`.

    Raises:
        UserError: an image or video cannot be read, or placeholders and images do not match; names the row.
    """
    refuse_surrogates(messages, where)
    parts = image_parts(messages)
    videos = [part for part in parts if part["type"] == "video"]
    if videos:
        _refuse_video(processor, where)
    template = getattr(processor, "chat_template", None) or processor.tokenizer.chat_template
    for part in parts:
        _refuse_unknown_keys(part, str(template), where)
    images = [load_image(p.get("image"), f"{where}, image {n}") for n, p in enumerate(parts) if p["type"] == "image"]
    films = [load_video(part, f"{where}, video {n}") for n, part in enumerate(videos)]
    try:
        text = processor.tokenizer.apply_chat_template(
            messages,
            chat_template=template,
            add_generation_prompt=True,
            tokenize=False,
            **template_kwargs,
        )
    except REFUSALS as error:
        raise UserError(f"{where}: the model's chat template rejects the prompt: {error}") from error
    # Gemma 3's template writes one token, which its processor expands to an image's whole run of placeholders.
    _match(text, getattr(processor, "boi_token", processor.image_token), len(images), "image", where)
    # Also without a video: the processor would look for the one of a token that is written in the text.
    if (token := getattr(processor, "video_token", None)) and token != processor.image_token:
        _match(text, token, len(videos), "video", where)
    return _run(processor, text, images, films, settings, where)


def _refuse_unknown_keys(part: Mapping[str, Any], template: str, where: str) -> None:
    """Refuses keys of an image or video that neither we nor the template read, such as those of qwen-vl-utils."""
    kind = part["type"]
    known = {"type", kind, *(["fps"] if kind == "video" else [])}
    for name, value in part.items():
        of_template = name not in _NEVER_READ and re.search(rf"\b{re.escape(name)}\b", template)
        if name in known or is_missing(value) or of_template:
            continue
        raise UserError(
            f"{where}: the key {name!r} of a part of type {kind} has no effect; remove it{_INSTEAD.get(name, '')}"
        )


_NEVER_READ = ("text", "image", "video")
"""Keys of parts of another type, of which a template's text says nothing about parts of this one."""

_LIMIT = " (use data.max_pixels, which holds for all images)"
_INSTEAD = {
    **dict.fromkeys(("max_pixels", "resized_height", "resized_width", "total_pixels"), _LIMIT),
    "min_pixels": _LIMIT.replace("max", "min"),
    **dict.fromkeys(("nframes", "max_frames", "min_frames", "sample_fps"), " (use fps, or give a list of frames)"),
    **dict.fromkeys(("video_start", "video_end"), " (cut the file, or give a list of frames)"),
    **dict.fromkeys(("path", "url", "base64"), " (give one of image, path, url and base64)"),
}


def _match(text: str, placeholder: str, count: int, kind: str, where: str) -> None:
    if (found := text.count(placeholder)) != count:
        raise UserError(
            f"{where}: {counted(found, f'{kind} placeholder')} for {counted(count, kind)}; give one {kind} for each, "
            f"and do not write {placeholder} in the text"
        )


_PER_TOKEN = ("mm_token_type_ids", "token_type_ids")
"""Tensors ``(1, P)`` of a processor besides the token ids."""


def _run(
    processor: Any, text: str, images: list[PILImage], videos: list[Video], settings: VisionSettings, where: str
) -> tuple[Tensor, dict[str, Tensor]]:
    kwargs: dict[str, Any] = {}
    if (bos := processor.tokenizer.bos_token) is not None and text.startswith(bos):
        kwargs["add_special_tokens"] = False  # the template wrote it (Gemma 3); the tokenizer would add a second one
    try:
        if images:
            kwargs |= _image_kwargs(processor, images, settings)
        if videos:
            kwargs |= _video_kwargs(processor, videos, settings)
        output = dict(processor(text=[text], return_tensors="pt", **kwargs))
    except ValueError as error:  # such as an aspect ratio that no grid of patches has
        raise UserError(f"{where}: the image processor rejects an image or video ({error})") from error
    ids = output.pop("input_ids")[0]
    for name in ("attention_mask", "video_metadata", "labels"):  # PaliGemma's processor makes labels
        output.pop(name, None)
    inputs = {name: torch.as_tensor(value) for name, value in output.items()}
    if has_added_eos(ids, text, processor.tokenizer):
        ids = ids[:-1]
        inputs |= {name: inputs[name][..., :-1] for name in _PER_TOKEN if name in inputs}
    if "mm_token_type_ids" in inputs:
        inputs["mm_token_type_ids"] = inputs["mm_token_type_ids"][0]
    for number, (kind, part) in enumerate((("image", "image_processor"), ("video", "video_processor")), start=1):
        if (grid := inputs.get(f"{kind}_grid_thw")) is None:
            continue
        merged = int(grid.prod(dim=1).sum()) // getattr(processor, part).merge_size ** 2
        if (tokens := int((inputs["mm_token_type_ids"] == number).sum())) != merged:
            raise UserError(
                f"{where}: {tokens} {kind} tokens for {merged} {kind} features; do not shorten the prompt by hand"
            )
    return ids, inputs


def _image_kwargs(processor: Any, images: list[PILImage], settings: VisionSettings) -> dict[str, Any]:
    if not settings.is_set:
        return {"images": images}
    return {"images": images, "images_kwargs": {"size": settings.size(processor.image_processor)}}


def _video_kwargs(processor: Any, videos: list[Video], settings: VisionSettings) -> dict[str, Any]:
    """Processor arguments that keep all frames and give their rate, from which positions and time stamps follow."""
    metadata = [
        VideoMetadata(total_num_frames=len(v.frames), fps=v.fps, frames_indices=list(range(len(v.frames))))
        for v in videos
    ]
    kwargs: dict[str, Any] = {"do_sample_frames": False, "video_metadata": metadata}
    if hasattr(processor.video_processor, "cap_pixels_per_frame"):  # Qwen's; they warn if it is not given
        kwargs["cap_pixels_per_frame"] = True
    if settings.is_set:  # here, because a processor has one size for all videos of a prompt
        videos = [_limited(video, processor.video_processor, settings) for video in videos]
        kwargs["do_resize"] = False
    return {"videos": [video.array() for video in videos], "videos_kwargs": kwargs}


def _limited(video: Video, processor: Any, settings: VisionSettings) -> Video:
    """The video with each frame within the limits, in whole patches."""
    whole = "Qwen3" in type(processor).__name__
    size = settings.size(processor, len(video.frames) if whole else 1)
    width, height = video.frames[0].size
    factor = processor.patch_size * processor.merge_size
    height, width = smart_resize(height, width, factor, size["shortest_edge"], size["longest_edge"])
    return replace(video, frames=tuple(frame.resize((width, height), Resampling.BICUBIC) for frame in video.frames))


def _refuse_video(processor: Any, where: str) -> None:
    if getattr(processor, "video_processor", None) is None:
        raise UserError(
            f"{where}: the prompt has a video, which needs a video processor: the model has none, or torchvision, "
            "which it needs, is not installed; give the frames as images"
        )
