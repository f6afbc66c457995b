"""Checks that checkpoints written by several ranks are whole and free of code before torch reads them.

``torch.distributed.checkpoint`` unpickles the index and everything that is no tensor without restrictions. Here the
index may hold only the few classes it is made of; every record is a zip archive of ``torch.save`` with its own
checksums, and lies in a file beside the index, so that the bytes that are checked are those that torch will read.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

INDEX = ".metadata"
"""File with the location of each record."""
REST = "meta.pt"
"""File in which Lightning keeps everything but weights and optimizer states."""
_CLASSES = {
    # Python 3.13 has them in a module of another name, which torch could not load in an older one.
    *((module, name) for module in ("pathlib", Path.__module__) for name in ("PosixPath", "WindowsPath")),
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
    *(
        ("torch.distributed.checkpoint.metadata", name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    ),
}  # fmt: skip


class _IndexUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        """Finds a class of an index, or a dtype; refuses everything else."""
        if (module, name) in _CLASSES or (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"{module}.{name} does not belong in a checkpoint")


def read_index(folder: Path) -> Metadata:
    """Reads the index of a sharded checkpoint: which record is where.

    Raises:
        pickle.UnpicklingError: it names something other than the parts of an index, or a record that is not stored
            untransformed in a file of ``folder``.
    """
    with (folder / INDEX).open("rb") as file:
        index: Metadata = _IndexUnpickler(file).load()
    if type(index) is not Metadata or type(index.storage_data) is not dict:
        raise pickle.UnpicklingError("it is not an index")
    for key, place in index.storage_data.items():
        if type(key) is not MetadataIndex or not _lies_beside(place):
            raise pickle.UnpicklingError(f"{key}: its record is not in a file next to the index")
    return index


def _lies_beside(place: Any) -> bool:
    """Whether torch reads a record from the same bytes as we do, without transforms."""
    try:
        name, start, length, made = place.relative_path, place.offset, place.length, place.transform_descriptors
    except AttributeError:
        return False
    is_name = type(name) is str and name == Path(name).name
    has_room = type(start) is int and type(length) is int and min(start, length) >= 0
    return is_name and has_room and not made  # torch would undo transforms before it unpickles


def is_whole_folder(folder: Path) -> bool:
    """Whether every record of a sharded checkpoint matches the checksum that was written with it.

    Raises:
        pickle.UnpicklingError: the index or a record holds something that could run code.
    """
    try:
        with zipfile.ZipFile(folder / REST) as archive:
            whole = archive.testzip() is None
        return whole and all(_is_whole(content, is_tensor) for content, is_tensor in _records(folder))
    except pickle.UnpicklingError:
        if _reads_as_pickle(folder / INDEX):
            raise
        return False
    except (zipfile.BadZipFile, zlib.error, EOFError, ValueError, OSError, NotImplementedError):
        return False


def _records(folder: Path) -> Iterator[tuple[bytes, bool]]:
    """The bytes of each record, and whether it is a tensor."""
    index = read_index(folder)
    for key, place in index.storage_data.items():
        with (folder / place.relative_path).open("rb") as file:
            file.seek(place.offset)
            content = file.read(place.length)
        if len(content) < place.length:
            raise EOFError
        yield content, not isinstance(index.state_dict_metadata.get(key.fqn), BytesStorageMetadata)


def _is_whole(content: bytes, is_tensor: bool) -> bool:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        if archive.testzip() is not None:
            return False
    if not is_tensor:
        torch.load(io.BytesIO(content), weights_only=True)
    return True


def _reads_as_pickle(path: Path) -> bool:
    """Whether a pickle parses to its end; one that does not is damaged, and no attack."""
    try:
        return sum(1 for _ in pickletools.genops(path.read_bytes())) > 0
    except ValueError:
        return False
