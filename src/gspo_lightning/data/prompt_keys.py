"""Which rows have equal prompts, so that no held-out prompt is trained on; no image is decoded for it."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gspo_lightning.data.images import PILImage, image_key, local_path
from gspo_lightning.errors import UserError
from gspo_lightning.paths import from_home

_NAMES = ("image", "bytes", "path", "url")
"""Keys of an image part that hold the image."""


def text_key(rows: Sequence[Any]) -> str:
    """A hash of the prompts of rows, equal on every machine: of images, videos and objects only the kind counts."""
    prompts = [row.get("prompt") if isinstance(row, Mapping) else row for row in rows]
    return hashlib.sha256(repr([_text(prompt) for prompt in prompts]).encode()).hexdigest()


def _text(value: Any) -> Any:
    if isinstance(value, Mapping):
        kind = value.get("type")
        is_text = kind in (None, "text") or not isinstance(kind, str)
        return sorted((str(name), _text(item)) for name, item in value.items()) if is_text else kind
    if isinstance(value, (list, tuple)):
        return [_text(item) for item in value]
    return value if isinstance(value, str | int | float) else type(value).__name__


class PromptKeys:
    """Keys of rows, equal for equal prompts.

    Files of images are compared by their bytes. Those of training rows are read only where a file of a held-out row
    has the same size, so the held-out rows come first.

    Args:
        columns: those that the prompt is made of.
        images: those of them with images.
    """

    def __init__(self, columns: Sequence[str], images: Collection[str]) -> None:
        self.columns, self.images = list(columns), frozenset(images)
        self._sizes: set[int] = set()
        self._files: dict[str, str] = {}
        """Keys of the files of training rows: many questions may be about one image."""

    def of_held_out(self, row: Any, where: str) -> str:
        """Key of a held-out row."""
        return self._key(row, where, held_out=True)

    def of_rows(self, rows: Any, label: str) -> list[str]:
        """Keys of all training rows, after those of the held-out ones."""
        if hasattr(rows, "select_columns"):  # a hub dataset: do not decode the images of a million rows
            rows = rows.select_columns([name for name in self.columns if name in rows.column_names])
        return [self._key(rows[i], f"{label} row {i}", held_out=False) for i in range(len(rows))]

    def _key(self, row: Any, where: str, *, held_out: bool) -> str:
        if not isinstance(row, Mapping):
            return repr(row)
        forms = []
        for name in self.columns:
            form = self._image if name in self.images else self._form
            forms.append(form(row.get(name), f"{where}, column {name!r}", held_out))
        return repr(forms)

    def _form(self, value: Any, where: str, held_out: bool) -> Any:
        """A form of a value that is equal for equal prompts, whatever kind of file they are from; bytes become a hash.

        Keys of a message may be in any order, with nulls that Arrow adds; a number may be a string. PIL images are
        compared by their pixels, arrays by their numbers.

        Raises:
            UserError: the value has no form but its address in memory, which another row's value may have later.
        """
        if isinstance(value, str):  # first, for the sake of a million rows
            return value
        if isinstance(value, (list, tuple)):
            return [self._form(item, where, held_out) for item in value]
        if isinstance(value, (dict, Mapping)):
            is_image = value.get("type") == "image"
            forms = {
                str(name): (self._image if is_image and name in _NAMES else self._form)(item, where, held_out)
                for name, item in value.items()
                if item is not None
            }
            return sorted(forms.items())
        if isinstance(value, bytes):
            return hashlib.sha256(value).hexdigest()
        if isinstance(value, PILImage):
            return image_key(value, where)
        if isinstance(value, np.ndarray) and value.dtype.kind not in "OSU":
            return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        if hasattr(value, "tolist") and not isinstance(value, np.generic):  # printed, a long tensor is mostly dots
            return self._form(value.tolist(), where, held_out)
        if re.search(r" at 0x[0-9a-fA-F]+>", text := str(value)):
            raise UserError(
                f"{where}: a value of type {type(value).__name__} cannot be compared with held-out prompts; give text, "
                "numbers, bytes, a path or a PIL image"
            )
        return text

    def _image(self, value: Any, where: str, held_out: bool) -> Any:
        """As `_form`, for an image or a list of them, in any form that `images.load_image` takes."""
        if isinstance(value, (list, tuple)):
            return [self._image(item, where, held_out) for item in value]
        if isinstance(value, Mapping):
            value = value.get("bytes") or value.get("path") or value.get("url")
        if not isinstance(value, (str, Path)):
            return self._form(value, where, held_out)
        name = str(value)
        if name not in self._files or held_out:
            self._files[name] = self._file(name, where, held_out)
        return self._files[name]

    def _file(self, name: str, where: str, held_out: bool) -> str:
        """The hash of the file; its name where it is no file, or has a size that no held-out one has."""
        if name[:5].lower() == "data:":
            return name
        try:
            path = from_home(local_path(name, "image", where))
            size = path.stat().st_size
            if held_out:
                self._sizes.add(size)
            return hashlib.sha256(path.read_bytes()).hexdigest() if size in self._sizes else name
        except (OSError, ValueError, RuntimeError, UserError):  # refused where the image is read
            return name
