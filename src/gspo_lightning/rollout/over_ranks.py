"""One rank requests the completions of all: for engines that are not in the trainer's process.

The engine sees one caller whatever the number of ranks: weights are written once, a server is verified once, and an
error is decided on in one place and raised on every rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch.distributed as dist

from gspo_lightning.distributed.failing import ErrorOfAllRanks
from gspo_lightning.distributed.ranks import rank, world_size
from gspo_lightning.errors import UserError
from gspo_lightning.rollout.engine import RolloutError
from gspo_lightning.types import Completion, Prompt

Groups = list[list[Completion]]


@dataclass(frozen=True)
class _Failure:
    kind: type[Exception]
    message: str


def on_first_rank(
    prompts: list[Prompt], generate: Callable[[list[Prompt]], Groups], *, with_rows: bool = False
) -> Groups:
    """Calls ``generate`` with all ranks' prompts on rank 0; every rank gets the completions of its own prompts.

    All ranks must call it together and equally often; a rank may have no prompts.

    Args:
        prompts: of this rank, without images.
        generate: called on rank 0.
        with_rows: whether ``generate`` reads the dataset rows, as environments do; else only tokens travel.

    Raises:
        RolloutError, ErrorOfAllRanks: on every rank, what rank 0 raised.
    """
    if world_size() == 1:
        return generate(prompts)
    mine = [p if with_rows else Prompt(p.uid, "", p.input_ids, {}) for p in prompts]
    gathered: list[list[Prompt]] | None = [[]] * world_size() if rank() == 0 else None
    dist.gather_object(mine, gathered, dst=0)
    parts: list[Groups | _Failure] | None = None if gathered is None else _answers(gathered, generate)
    answer: list[Groups | _Failure] = [[]]
    dist.scatter_object_list(answer, parts, src=0)
    if isinstance(answer[0], _Failure):
        raise answer[0].kind(answer[0].message)
    return answer[0]


def _answers(asked: list[list[Prompt]], generate: Callable[[list[Prompt]], Groups]) -> list[Groups | _Failure]:
    try:
        groups = generate([prompt for of_rank in asked for prompt in of_rank])
    except (RolloutError, UserError) as error:
        kind = ErrorOfAllRanks if type(error) is UserError else type(error)
        return [_Failure(kind, str(error))] * len(asked)
    edges = accumulate(map(len, asked), initial=0)
    return [groups[start:end] for start, end in pairwise(edges)]
