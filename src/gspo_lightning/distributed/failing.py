"""Lets all ranks fail where one does, so that none waits for it and what is done can be saved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from gspo_lightning.distributed.ranks import global_max, world_size
from gspo_lightning.errors import UserError


class ErrorOfAllRanks(UserError):
    """A mistake that every rank raises at the same place."""


@contextmanager
def failing_together(device: torch.device) -> Iterator[None]:
    """Context that all ranks enter and in which none waits for another: they leave it together, whole or failed.

    Args:
        device: on which ranks exchange tensors.

    Raises:
        UserError: as raised inside, by a single process.
        ErrorOfAllRanks: the `UserError` of the first rank that raised one, on every rank.
    """
    said, failed = "", None
    try:
        yield
    except UserError as error:
        if world_size() == 1:
            raise
        said, failed = str(error), error
    if not global_max(int(failed is not None), device):
        return
    of_ranks = [""] * world_size()
    dist.all_gather_object(of_ranks, said)
    raise ErrorOfAllRanks(next(filter(None, of_ranks))) from failed
