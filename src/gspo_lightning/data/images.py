"""Pictures as they come (paths, bytes, PIL, columns of datasets) to upright RGB; every mistake names the row."""

from __future__ import annotations

import base64
import io
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from gspo_lightning.errors import UserError

MAX_PIXELS_DECODED = 512 * 1024 * 1024
"""Above this a picture is refused: a file of some kilobytes can ask for any amount of memory."""

Picture = Image.Image


def load_image(value: Any, where: str) -> Picture:
    """An upright RGB picture.

    Greyscale, palette and CMYK are converted; transparent pixels are put on white; the rotation that a camera
    noted (EXIF) is applied.

    Args:
        value: a path, encoded bytes, a PIL image, or a mapping with ``bytes`` or ``path`` (a column of ``datasets``).
        where: such as ``row x:train:3``; the error begins with it.

    Raises:
        UserError: it is missing, empty, broken, or far too large.
    """
    image = _open(value, where)
    width, height = image.size
    if not width or not height:
        raise UserError(f"{where}: the image is {width} x {height} pixels; remove the row or mend the image")
    if width * height > MAX_PIXELS_DECODED:
        raise UserError(f"{where}: the image is {width} x {height} pixels, too large to decode; make it smaller")
    try:
        return _on_white(ImageOps.exif_transpose(image))
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{where}: the image is broken ({error}); mend the file or remove the row") from error


def thumbnail_uri(value: Any, side: int = 160) -> str:
    """A small copy of a picture as a ``data:`` address, for a report that is one file."""
    image = load_image(value, "report")
    image.thumbnail((side, side))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def _open(value: Any, where: str) -> Picture:
    if isinstance(value, Image.Image):
        return value
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if value is None:
        raise UserError(f"{where}: the image is missing")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise UserError(f"{where}: the image is an address on the web; download it and give the file's path")
    if not isinstance(value, str | Path | bytes):
        raise UserError(f"{where}: an image is a path, bytes or a PIL image, not {type(value).__name__}")
    name = "its bytes" if isinstance(value, bytes) else str(value)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked above
            return Image.open(io.BytesIO(value) if isinstance(value, bytes) else value)
    except FileNotFoundError as error:
        raise UserError(f"{where}: there is no image {name}") from error
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError) as error:
        raise UserError(f"{where}: cannot read the image from {name} ({error})") from error


def _on_white(image: Picture) -> Picture:
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")
