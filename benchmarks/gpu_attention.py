"""Attention of one layer over a shared-prefix row on a GPU in its three forms: docs/performance.md.

python -m benchmarks.gpu_attention
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable

import torch

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout, shared_prefix_attention
from gspo_lightning.packing.flash import flash_shared_prefix_attention
from gspo_lightning.packing.flex import flex_shared_prefix_attention

ROWS = ([GroupLayout(256, (256,) * 8)] * 4, [GroupLayout(1024, (1024,) * 8)], [GroupLayout(45, (16,) * 8)] * 48)
FORMS = {
    "FlashAttention": flash_shared_prefix_attention,
    "FlexAttention": flex_shared_prefix_attention,
    "blocks": shared_prefix_attention,
}
HEADS = ((16, 2, 128), (14, 2, 64))
"""Query heads, key heads, size of a head."""


def milliseconds(run: Callable[[], object], repeats: int = 5) -> float:
    """Mean of some calls after two that warm up."""
    for number in range(2 + repeats):
        if number == 2:
            torch.cuda.synchronize()
            start = time.perf_counter()
        run()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / repeats * 1e3


def main() -> None:
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, bfloat16; forward, forward and backward, in ms")
    for groups in ROWS:
        layout = SharedPrefixLayout(tuple(groups), torch.device("cuda"))
        for heads, key_heads, size in HEADS:
            query, key, value = (
                torch.randn(1, n, layout.num_tokens, size, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                for n in (heads, key_heads, key_heads)
            )
            for name, form in FORMS.items():

                def forward(form=form, q=query, k=key, v=value, layout=layout, size=size) -> torch.Tensor:  # type: ignore[no-untyped-def]
                    return form(q, k, v, layout, scaling=size**-0.5)

                with torch.no_grad():
                    alone = milliseconds(forward)
                both = milliseconds(lambda forward=forward: forward().sum().backward())  # type: ignore[misc]
                print(
                    f"{layout.num_tokens} tokens, {heads} heads of {size}, {name}: {alone:.2f}, {both:.2f}", flush=True
                )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
