"""The attention that runs on a GPU, tried on the CPU: the same for whatever anybody looks at."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.models import attention, device_attention
from posttrain.models.packing import Layout, pack
from tiny_models import ragged_batch


def computed(layout: Layout, dtype: torch.dtype, window: int | None, groups: int) -> tuple[torch.Tensor, ...]:
    """Outputs, and gradients of queries, keys and values."""
    draw = torch.Generator().manual_seed(0)
    length = len(layout.tokens)
    q, k, v = (
        torch.randn(1, heads, length, 8, generator=draw).to(dtype).requires_grad_() for heads in (2 * groups, 2, 2)
    )
    out, _ = attention.attention_forward(
        torch.nn.Module(), q, k, v, None, packed_layout=layout, sliding_window=window
    )  # fmt: skip
    out.backward(torch.randn(out.shape, generator=draw).to(dtype))
    return out, q.grad, k.grad, v.grad


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("share", [True, False])
def test_it_is_the_attention_of_the_cpu(
    share: bool, dtype: torch.dtype, groups: int, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = pack(ragged_batch(), share_prompts=share)
    assert {b.whole for b in layout.buckets} == ({True, False} if share else {True})
    expected = computed(layout, dtype, window, groups)
    seen: list[bool] = []

    real = device_attention.attend

    def noting(*given: Any) -> torch.Tensor:
        seen.append(given[-1])
        return real(*given)

    monkeypatch.setattr(device_attention, "suits", lambda query: True)
    monkeypatch.setattr(device_attention, "attend", noting)
    found = computed(layout, dtype, window, groups)
    assert len(seen) == len(layout.buckets)
    if window is None:
        assert seen == [b.whole for b in layout.buckets]
    else:
        assert not all(seen), "a window that is shorter than a row is a mask of its own"
    for a, b in zip(found, expected, strict=True):
        assert float((a.float() - b.float()).detach().norm() / b.float().detach().norm()) <= (
            1e-5 if dtype == torch.float32 else 1e-2
        )
