"""Converts videos of any source (frames, a folder of frames, a file) to frames of one size; errors name the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from gspo_lightning.data.images import PILImage, as_sought, load_image, local_path
from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home

DEFAULT_FPS = 2.0
"""Frames per second if a row does not say: the rate Qwen's models were trained at."""

FRAME_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})


@dataclass(frozen=True)
class Video:
    """Upright RGB frames of one size, and their rate in frames per second."""

    frames: tuple[PILImage, ...]
    fps: float

    def array(self) -> np.ndarray:
        """The frames as ``(frames, H, W, 3)`` uint8."""
        return np.stack([np.asarray(frame) for frame in self.frames])


def load_video(part: Mapping[str, Any], where: str) -> Video:
    """The video of a part ``{"type": "video", "video": ..., "fps": ...}`` of a message.

    Args:
        part: ``video`` is a list of images, a folder of images (frames in the order of their names) or a file, for
            which PyAV is needed; ``fps`` is the rate of given frames, or the rate at which the file is read.
        where: such as ``row x:train:3, video 0``; the error begins with it.

    Raises:
        UserError: it is missing, broken, without a frame, or of frames of different sizes.
    """
    value, fps = part.get("video"), part.get("fps") or DEFAULT_FPS
    if isinstance(fps, bool) or not isinstance(fps, int | float) or not 0 < fps < float("inf"):
        raise UserError(f"{where}: fps={fps!r} must be a number above 0")
    frames = [load_image(frame, f"{where}, frame {n}") for n, frame in enumerate(_frames(value, fps, where))]
    if not frames:
        raise UserError(f"{where}: the video has no frames; fix it or remove the row")
    if len(sizes := sorted({frame.size for frame in frames})) > 1:
        raise UserError(f"{where}: the frames differ in size ({sizes[0]} and {sizes[-1]}); make them one size")
    return Video(tuple(frames), float(fps))


def _frames(value: Any, fps: float, where: str) -> Sequence[Any]:
    if value is None:
        raise UserError(f"{where}: the video is missing")
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return value
    if not isinstance(value, str | Path):
        raise UserError(f"{where}: a video is a list of frames, a folder or a file, not {type(value).__name__}")
    if isinstance(value, str):
        value = local_path(value, "video", where)
    path = from_home(value)
    if path.is_dir():
        return sorted(file for file in path.iterdir() if file.suffix.lower() in FRAME_SUFFIXES)
    if not path.is_file():
        raise UserError(f"{where}: there is no video {value}{as_sought(value)}")
    return _decoded(path, fps, where)


def _decoded(path: Path, fps: float, where: str) -> list[PILImage]:
    """Frames of a file, ``fps`` per second of its running time."""
    try:
        import av  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"{where}: reading {path.name} needs PyAV, which is not installed here; pip install av, or give a list "
            "or a folder of frames"
        ) from error
    try:
        with av.open(str(path)) as container:
            taken: list[PILImage] = []
            for frame in container.decode(video=0):
                # The small addend allows for a time stamp that was rounded down.
                if frame.time is None or frame.time * fps + 1e-3 >= len(taken):
                    taken.append(frame.to_image())
            return taken
    except (av.error.FFmpegError, IndexError) as error:
        raise UserError(f"{where}: cannot read the video {path} ({error})") from error
