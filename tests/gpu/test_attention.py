"""On CUDA: the three forms of the attention against float64, gradients included."""

from __future__ import annotations

import pytest
import torch

from gspo_lightning.packing import GroupLayout, SharedPrefixLayout
from gspo_lightning.packing.attention import shared_prefix_attention
from gspo_lightning.packing.flash import Spans, flash_backward, flash_forward, flash_shared_prefix_attention
from gspo_lightning.packing.flex import flex_shared_prefix_attention
from tests.packing import test_flash
from tests.support import relative_distance

pytestmark = pytest.mark.gpu

LAYOUTS = {
    "ragged": (GroupLayout(6, (3, 0, 4, 2, 11, 2)), GroupLayout(5, ()), GroupLayout(1, (2,))),
    "several blocks of scores": (GroupLayout(200, (150, 3, 40)), GroupLayout(90, (7, 61))),
    "single tokens": (GroupLayout(1, (1,)), GroupLayout(1, ())),
    "long": (GroupLayout(700, (300, 512, 41)), GroupLayout(64, (64,) * 8)),
    "a common prefix": (GroupLayout(180, (50, 3, 40)), GroupLayout(153, (7, 61)), GroupLayout(151, ())),
}
COMMON = {"a common prefix": 150}
FORMS = {
    "sdpa": shared_prefix_attention,
    "flex": flex_shared_prefix_attention,
    "flash": flash_shared_prefix_attention,
}


def run(form, name, dtype, window, with_sinks, size, head_ratio):
    """Output and gradients, from the same numbers whatever the dtype."""
    layout = SharedPrefixLayout(LAYOUTS[name], torch.device("cuda"), COMMON.get(name, 0))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(torch.bfloat16).to("cuda", dtype).requires_grad_()

    tokens = layout.num_tokens
    query, key, value = (draw(1, heads, tokens, size) for heads in (2 * head_ratio, 2, 2))
    sinks = draw(2 * head_ratio) if with_sinks else None
    inputs = [x for x in (query, key, value, sinks) if x is not None]
    out = FORMS[form](query, key, value, layout, scaling=size**-0.5, window=window, sinks=sinks)
    weights = torch.randn(out.shape, generator=generator).to("cuda", dtype)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


# Float32 products of the kernel are IEEE, and sums of up to a thousand terms; bfloat16 keeps 8 bits.
BOUNDS = {torch.float32: 2e-6, torch.bfloat16: 1.5e-2}


@pytest.fixture(scope="module", params=[(d, s, n) for d in BOUNDS for s, n in ((True, 64), (False, 128))], ids=str)
def variant(request):
    """Dtype, with sinks or without, head size: a kernel each. Windows and lengths must not need another."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield request.param
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2  # one, and one for lengths that vary


@pytest.mark.parametrize("window", [None, 4, 130])
@pytest.mark.parametrize("name", LAYOUTS)
def test_all_forms_give_float64s_output_and_gradients(variant, name, window):
    dtype, with_sinks, size = variant
    exact = run("sdpa", name, torch.float64, window, with_sinks, size, 3)
    for form in FORMS:
        if form == "flash" and (dtype == torch.float32 or with_sinks or window is not None):
            continue
        for number, (a, b) in enumerate(zip(run(form, name, dtype, window, with_sinks, size, 3), exact, strict=True)):
            assert relative_distance(a.double(), b) < BOUNDS[dtype], (form, number)


def test_the_kernel_does_what_its_stand_in_says():
    """`tests/packing/test_flash.py` proves in float64 what is made of it."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).bfloat16().cuda()

    def ends(*numbers):
        return torch.tensor(numbers, dtype=torch.int32, device="cuda")

    query, key, value, grad = draw(150, 6, 64), draw(460, 2, 64), draw(460, 2, 64), draw(150, 6, 64)
    calls = {
        "every key": Spans(ends(0, 1, 90, 150), ends(0, 60, 200, 460), 100, 300, False),
        "some keys": Spans(ends(0, 1, 90, 150), ends(0, 60, 200, 460), 100, 300, False, ends(7, 139, 1)),
        "causal": Spans(ends(0, 1, 90, 150), ends(0, 1, 90, 150), 89, 89, True),
    }
    wide = [x.double() for x in (query, key, value)]
    for name, spans in calls.items():
        out, total = flash_forward(query, key, value, spans, 0.2)
        exact, exact_total = test_flash.forward(*wide, spans, 0.2)
        assert relative_distance(out.double(), exact) < 1e-2, name
        assert relative_distance(total.double(), exact_total) < 1e-5, name
        if spans.keys_used is not None:
            continue
        # The sums of more keys than these: every weight is smaller by a factor of its token's own.
        more = exact_total + torch.rand(150, device="cuda")
        exact_grads = test_flash.backward(grad.double(), *wide, exact, more, spans, 0.2)
        used = slice(0, int(spans.key_ends[-1]))
        grads = flash_backward(grad, query, key[used], value[used], exact.bfloat16(), more.float(), spans, 0.2)
        for number, (ours, there) in enumerate(zip(grads, exact_grads, strict=True)):
            assert relative_distance(ours.double(), there[: len(ours)]) < 1e-2, (name, number)


def test_gradients_of_the_kernel_repeat_to_the_bit():
    """Its sums are in the order of arrival unless it is told otherwise."""
    first, *others = (run("flash", "long", torch.bfloat16, None, False, 64, 3) for _ in range(6))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))
