"""Converts images of any source (paths, bytes, PIL, dataset columns) to upright RGB; every error names the row."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home

MAX_PIXELS_DECODED = 512 * 1024 * 1024
"""A larger image is refused: a file of some kilobytes can require any amount of memory."""

PILImage = Image.Image

_warned_of: set[str] = set()
"""Formats of which an animation was found in this process."""

_ORIENTATION = 0x0112
"""The EXIF tag of the rotation that a camera noted."""

FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")
"""Accepted formats, by Pillow's names. Others are refused: EPS starts Ghostscript, which is a programming language."""


def load_image(value: Any, where: str) -> PILImage:
    """An upright RGB image.

    Greyscale (8 or 16 bits), palette and CMYK images are converted; transparent pixels are put on white; the
    rotation that a camera noted (EXIF) is applied.

    Args:
        value: a path, encoded bytes, a PIL image, a ``file://`` address, a ``data:`` address in base64, or a mapping
            with one of these as ``bytes``, ``path`` (a column of ``datasets``) or ``url``. One of `FORMATS`.
        where: such as ``row x:train:3``; the error begins with it.

    Raises:
        UserError: it is missing, empty, broken, far too large, of another format, or has no range of brightness.
    """
    image = _open(value, where)
    _check_size(image, where)
    _warn_of_frames(image, where)
    if image.mode == "F" or (image.mode == "I" and image.format != "PPM"):  # which Pillow scales to 16 bits
        raise UserError(
            f"{where}: the image has 32-bit pixel values (mode {image.mode}), and which value is white is unknown; "
            "save it with 8 or 16 bits per pixel"
        )
    try:
        return _on_white(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders raise anything
        raise _broken(error, where) from error


def image_key(image: PILImage, where: str) -> str:
    """A hash that is equal for PIL images that `load_image` makes the same image of, if they have the same mode.

    Raises:
        UserError: it is broken, far too large, or of none of `FORMATS`.
    """
    _check_size(_of_known_format(image, where), where)
    try:
        pixels = image.tobytes()
        palette = image.getpalette("RGBA") if image.mode in ("P", "PA") else None
        shown = (image.mode, image.size, palette, image.info.get("transparency"), image.getexif().get(_ORIENTATION))
    except Exception as error:  # decoders raise anything
        raise _broken(error, where) from error
    return hashlib.sha256(repr(shown).encode() + pixels).hexdigest()


def _check_size(image: PILImage, where: str) -> None:
    width, height = image.size
    if not width or not height:
        raise UserError(f"{where}: the image is {width} x {height} pixels; remove the row or fix the image")
    if width * height > MAX_PIXELS_DECODED:
        raise UserError(f"{where}: the image is {width} x {height} pixels, too large to decode; make it smaller")


def _warn_of_frames(image: PILImage, where: str) -> None:
    """Warns, once per format, that only one frame of an animation is seen; an MPO's other ones are previews."""
    if image.format in (None, "MPO", *_warned_of):
        return
    count = 1
    with contextlib.suppress(Exception):  # a later frame is broken, and nobody will see it
        count = getattr(image, "n_frames", 1)
    if count > 1:
        _warned_of.add(str(image.format))
        warnings.warn(
            f"{where}: the image has {count} frames, of which the model sees one; give animations as videos (a list of "
            "frames). This is said once",
            stacklevel=3,
        )


def _broken(error: Exception, where: str) -> UserError:
    return UserError(f"{where}: the image is broken ({_short(str(error))}); fix the file or remove the row")


def thumbnail_uri(value: Any) -> str:
    """A small copy of an image as a ``data:`` address, for the self-contained report."""
    image = load_image(value, "report")
    image.thumbnail((160, 160))
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode("ascii")


def local_path(value: str, what: str, where: str) -> str:
    """The path that a text names: itself, or that of an address ``file:///...`` on this machine.

    Raises:
        UserError: it is another address, such as ``https://...`` or ``s3://...``.
    """
    if (address := urlsplit(value) if value[:7].lower() == "file://" else None) is not None:
        if address.netloc in ("", "localhost"):
            return unquote(value[7 + len(address.netloc) :])
        raise UserError(
            f"{where}: the {what} is on the machine {address.netloc} ({_short(value)}); give a path on this one, as in "
            "file:///folder/name"
        )
    if re.match(r"[a-z][a-z0-9+.-]*://", value, re.IGNORECASE):
        raise UserError(
            f"{where}: the {what} is a URL ({_short(value)}), and URLs are not fetched; download it and give the "
            "file's path"
        )
    return value


def as_sought(path: str | Path) -> str:
    """Where a file was looked for whose name is relative or begins with ``~``; empty for other names."""
    full = from_home(path).absolute()
    if full == Path(path):
        return ""
    return f" (looked for {_short(str(full))}; a relative path is within the folder of the command)"


def _open(value: Any, where: str) -> PILImage:
    if isinstance(value, Image.Image):
        return _of_known_format(value, where)
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path") or value.get("url")
    if value is None:
        raise UserError(f"{where}: the image is missing")
    if isinstance(value, str) and not value.strip():
        raise UserError(f"{where}: the image is blank text; give a path, or remove the row")
    if not isinstance(value, str | Path | bytes):
        raise UserError(f"{where}: an image is a path, bytes or a PIL image, not {type(value).__name__}")
    name = "its bytes" if isinstance(value, bytes) else _short(str(value))
    if isinstance(value, str):
        value = local_path(value, "image", where)
    opened: Path | io.BytesIO
    try:
        if isinstance(value, str) and value[:5].lower() == "data:":
            opened = io.BytesIO(_decoded(value))
        elif isinstance(value, bytes):
            opened = io.BytesIO(value)
        else:
            opened = from_home(value)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # our own limit is checked above
            return Image.open(opened, formats=FORMATS)
    except FileNotFoundError as error:  # of a path alone
        raise UserError(f"{where}: there is no image {name}{as_sought(value)}") from error
    except UnidentifiedImageError as error:
        raise UserError(
            f"{where}: cannot read the image from {name} (not one of {', '.join(FORMATS)}); save it as PNG or JPEG"
        ) from error
    except Exception as error:  # decoders raise anything
        raise UserError(f"{where}: cannot read the image from {name} ({_short(str(error))})") from error


def _of_known_format(image: PILImage, where: str) -> PILImage:
    """The image, opened elsewhere; refuses other formats, as its file may not have been decoded yet."""
    if image.format not in (None, "MPO", *FORMATS):  # MPO are several JPEG in one file
        raise UserError(
            f"{where}: the image is {image.format}, not one of {', '.join(FORMATS)}; save it as PNG or JPEG"
        )
    return image


def _decoded(address: str) -> bytes:
    """The bytes within ``data:image/png;base64,...``."""
    kind, _, data = unquote(address).partition(",")
    if not kind.lower().endswith(";base64"):
        raise ValueError("a data: URL must be in base64")
    return base64.b64decode("".join(data.split()), validate=True)


def _short(name: str) -> str:
    """A short form of a name for messages: an image in base64 would be a line of megabytes, or many lines."""
    name = " ".join(name.splitlines())
    return name if len(name) <= 200 else f"{name[:60]}... ({len(name)} characters)"


def _on_white(image: PILImage) -> PILImage:
    if image.mode.startswith("I"):
        image = _in_8_bits(image)
    if image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        background = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(background, rgba).convert("RGB")
    return image.convert("RGB")


def _in_8_bits(image: PILImage) -> PILImage:
    """The high bytes of a 16-bit grey image, as Pillow does for 16-bit colour; Pillow's own `convert` clips."""
    values = np.asarray(image)
    grey = Image.fromarray((values >> 8).astype(np.uint8))
    if (transparent := image.info.get("transparency")) is not None:
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey
