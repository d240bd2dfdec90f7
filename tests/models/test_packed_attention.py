"""Attention of a layer over a packed row in C: outputs and gradients of the plain path, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from posttrain.models import attention, packing
from posttrain.models.attention import attention_forward
from posttrain.models.packing import Layout, pack, pack_prompts
from posttrain.native import library
from posttrain.objective.batch import Batch
from tiny_models import continued, random_tokens

pytestmark = pytest.mark.skipif(library.library() is None, reason="posttrain was built without its C functions")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", list(TOLERANCE), ids=["fp32", "bf16"])


def prompts(lengths: list[int]) -> Layout:
    return pack_prompts([torch.arange(n) for n in lengths])


def groups(shapes: list[tuple[int, list[int]]], *, share: bool = True) -> Layout:
    draw = torch.Generator().manual_seed(0)
    batch = Batch.of([continued(random_tokens(prompt, draw), lengths, draw) for prompt, lengths in shapes])
    return pack(batch, share_prompts=share)


LAYOUTS: dict[str, Callable[[], Layout]] = {
    "ragged": lambda: prompts([37, 5, 40, 1, 12, 30]),
    "one": lambda: prompts([7]),
    "blocks": lambda: prompts([70, 61, 33, 90]),
    "shared": lambda: groups([(9, [4, 7, 1, 12]), (20, [3, 3]), (5, [6])]),
    "shared in blocks": lambda: groups([(30, [70, 64, 66, 12]), (50, [90, 80])]),
    "apart": lambda: groups([(9, [4, 7, 1, 12]), (20, [3, 3])], share=False),
}


def drawn(layout: Layout, dtype: torch.dtype, heads: int, kv: int, width: int = 8, value: int = 8) -> list[Tensor]:
    """query, key and value `[1, heads, N, width]`, and the gradient of what attention finds."""
    draw, tokens = torch.Generator().manual_seed(1), len(layout.tokens)
    found = [torch.randn(1, tokens, *shape, generator=draw) for shape in ((heads, width), (kv, width), (kv, value))]
    given_back = torch.randn(1, tokens, heads, value, generator=draw)
    return [*(t.to(dtype).transpose(1, 2) for t in found), given_back.to(dtype)]


def computed(layout: Layout, inputs: list[Tensor], window: int | None = None) -> list[Tensor]:
    *given_to, back = inputs
    q, k, v = (t.detach().requires_grad_() for t in given_to)
    out, _ = attention_forward(torch.nn.Module(), q, k, v, None, packed_layout=layout, sliding_window=window)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), back)]


def agree(layout: Layout, inputs: list[Tensor], window: int | None = None) -> None:
    """The plain path in fp32 is what both dtypes are held to."""
    found = computed(layout, inputs, window)
    with library.switched_off():
        wanted = computed(layout, [t.float() for t in inputs], window)
    for one, other, like in zip(found, wanted, [inputs[3], *inputs[:3]], strict=True):
        assert one.dtype == like.dtype
        assert one.shape == like.shape
        assert float((one.float() - other).norm()) <= TOLERANCE[one.dtype] * float(other.norm())
        assert float((one.float() - other).abs().max()) <= 2 * TOLERANCE[one.dtype] * float(other.abs().max())


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "BLOCK", 32)


@DTYPES
@pytest.mark.parametrize("window", [None, 4, 40])
@pytest.mark.parametrize(("heads", "kv"), [(4, 4), (6, 2), (3, 1)])
@pytest.mark.parametrize("name", list(LAYOUTS))
def test_it_is_the_plain_path(name: str, heads: int, kv: int, window: int | None, dtype: torch.dtype) -> None:
    layout = LAYOUTS[name]()
    agree(layout, drawn(layout, dtype, heads, kv), window)


@DTYPES
@pytest.mark.parametrize("value", [6, 24])
def test_values_of_another_width(value: int, dtype: torch.dtype) -> None:
    layout = LAYOUTS["shared"]()
    agree(layout, drawn(layout, dtype, 4, 2, width=12, value=value))


@DTYPES
def test_inputs_of_any_strides(dtype: torch.dtype) -> None:
    layout = LAYOUTS["shared"]()
    inputs = drawn(layout, dtype, 4, 4)
    fused = torch.cat(inputs[:3], -1)  # one projection to queries, keys and values
    for strange in (
        [*fused.split(8, -1), inputs[3]],
        [t.contiguous() for t in inputs],
        [t.transpose(2, 3).contiguous().transpose(2, 3) for t in inputs],
    ):
        assert all(torch.equal(a, b) for a, b in zip(strange, inputs, strict=True))
        agree(layout, strange)


@settings(deadline=None, max_examples=25)
@given(
    st.lists(
        st.tuples(st.integers(1, 60), st.lists(st.integers(1, 60), min_size=1, max_size=4)), min_size=1, max_size=3
    ),
    st.booleans(),
    st.sampled_from([None, 3, 33]),
)
def test_any_groups(shapes: list[tuple[int, list[int]]], share: bool, window: int | None) -> None:
    layout = groups(shapes, share=share)
    agree(layout, drawn(layout, torch.float32, 2, 1), window)


def test_without_gradients_it_is_the_same() -> None:
    layout = LAYOUTS["shared in blocks"]()
    inputs = drawn(layout, torch.float32, 4, 2)
    with torch.inference_mode():
        out, _ = attention_forward(torch.nn.Module(), *inputs[:3], None, packed_layout=layout)
    assert torch.equal(out, computed(layout, inputs)[0])


def test_a_prompt_of_many_rows_adds_up_in_fp32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Closer to exact sums than those that are rounded to bf16 bucket by bucket."""
    monkeypatch.setattr(packing, "SCORES_PER_BUCKET", 100)
    layout = groups([(12, [3] * 64)])
    inputs = drawn(layout, torch.bfloat16, 2, 1)
    found = computed(layout, inputs)
    monkeypatch.setattr(attention, "_takes_rows", lambda *_: False)
    rounded = computed(layout, inputs)
    exact = computed(layout, [t.float() for t in inputs])
    for place in (2, 3):
        near, far = (float((t[place][:, :, :12].float() - exact[place][:, :, :12]).norm()) for t in (found, rounded))
        assert near < 0.7 * far


def test_padded_keys_take_no_part() -> None:
    """Their index is that of the first packed token, which may be one of another row."""
    layout = prompts([5, 4])
    assert len(layout.buckets) == 1
    inputs = drawn(layout, torch.float32, 2, 2)
    inputs[2][:, :, 0] = float("inf")
    out = computed(layout, inputs)[0]
    assert not torch.isfinite(out[:, :5]).any()
    assert torch.isfinite(out[:, 5:]).all()


@pytest.mark.parametrize("fused", [True, False])
def test_it_keeps_the_packed_row_alone(fused: bool) -> None:
    """Not the rectangles, and not the projection that queries, keys and values are parts of."""
    layout = LAYOUTS["shared in blocks"]()
    inputs = drawn(layout, torch.float32, 4, 4)[:3]
    if fused:
        inputs = list(torch.cat(inputs, -1).split(8, -1))
    for t in inputs:
        t.requires_grad_()
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        out, _ = attention_forward(torch.nn.Module(), *inputs, None, packed_layout=layout)
    assert sum(kept.values()) == sum(t.nbytes for t in (*inputs, out))


def test_what_the_functions_do_not_know_goes_the_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Tensor:
        raise AssertionError("not for this")

    layout = LAYOUTS["ragged"]()
    inputs = drawn(layout, torch.float32, 4, 2)
    monkeypatch.setattr(attention, "attend_packed", fail)
    with pytest.raises(AssertionError, match="not for this"):
        computed(layout, inputs)
    computed(layout, [t.double() for t in inputs])
    attention_forward(torch.nn.Module(), *inputs[:3], None, packed_layout=layout, softcap=2.0)
    monkeypatch.setattr(attention, "LONG", 40)
    computed(layout, inputs)


@pytest.mark.parametrize("name", list(LAYOUTS))
def test_blocks_hold_every_query_once_and_the_keys_that_it_sees(name: str) -> None:
    layout = LAYOUTS[name]()
    queries: list[int] = []
    for bucket in layout.buckets:
        assert bucket.blocks(None) is bucket.blocks(bucket.key.shape[1])
        rows, width = bucket.query.shape
        seen = {}
        for row, place in ((i // width, i % width) for i in bucket.query_rows.tolist()):
            seen[int(bucket.query[row, place])] = bucket.key[row][bucket.mask[row, 0, place]].tolist()
        for block in bucket.blocks(None):
            assert all(t.is_contiguous() for t in block)
            assert len(block.query) == len(block.key) == rows
            assert block.mask.any(-1).all()
            assert not block.mask[:, 0].any(1)[block.key < 0].any()
            for row, place in (block.query >= 0).nonzero().tolist():
                queries.append(int(block.query[row, place]))
                assert block.key[row][block.mask[row, 0, place]].tolist() == seen[queries[-1]]
    assert sorted(queries) == list(range(len(layout.tokens)))
    assert any(len(bucket.blocks(None)) > 1 for bucket in layout.buckets) == ("blocks" in name)
