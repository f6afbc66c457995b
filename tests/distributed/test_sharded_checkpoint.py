"""A checkpoint in parts is read from where it was checked."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import save
from torch.distributed.checkpoint.metadata import MetadataIndex

from gspo_lightning.distributed.sharded_checkpoint import read_index
from gspo_lightning.errors import UserError
from gspo_lightning.program.resume import find_checkpoint
from tests.program.test_resume import Payload


def sharded(folder):
    """A checkpoint in parts, with a tensor and something that is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of one process
        save({"w": torch.arange(3.0), "rate": "0.1"}, checkpoint_id=folder)
    torch.save({"gspo_lightning": {}}, folder / "meta.pt")
    return folder, read_index(folder)


def test_a_record_that_torch_would_read_from_another_file_is_refused(tmp_path, monkeypatch):
    folder, index = sharded(tmp_path / "last.ckpt")
    assert find_checkpoint(str(folder), tmp_path, sharded=True) == folder
    torch.save("harmless", folder / "evil.distcp")
    (folder / "sub").mkdir()
    torch.save(Payload(), folder / "sub" / "evil.distcp")
    size = max(path.stat().st_size for path in (folder / "evil.distcp", folder / "sub" / "evil.distcp"))
    for path in (folder / "evil.distcp", folder / "sub" / "evil.distcp"):
        path.write_bytes(path.read_bytes().rjust(size, b"\0"))  # an archive may begin with anything
    monkeypatch.setattr(os, "getcwd", lambda: pytest.fail("the payload ran"))
    place = index.storage_data[MetadataIndex("rate")]
    whole = vars(place).copy()
    elsewhere = {"offset": 0, "length": size}
    for change in (
        {"relative_path": "sub/evil.distcp", **elsewhere},
        {"relative_path": str(folder / "sub" / "evil.distcp"), **elsewhere},
        {"relative_path": Path("evil.distcp"), **elsewhere},
        {"length": -1},
        {"offset": -1},
        {"transform_descriptors": ["stream.zstd/1"]},
    ):
        vars(place).update(whole | change)
        (folder / ".metadata").write_bytes(pickle.dumps(index))
        with pytest.raises(UserError) as error:
            find_checkpoint(str(folder), tmp_path, sharded=True)
        assert str(error.value) == f"ckpt_path={folder}: holds pickled Python objects, which could run code; refused"
