"""Decode-time attention of Double Sparsity beside dense attention: time of a step, and how close its outputs are.

`python -m benchmarks.sparse_attention` makes the keys and values of one layer over a long context, lets both attend to
them in turn, and prints the ratio of their times with its spread, and what a step reads by the formula of card 146.
Only a quiet machine gives figures that mean something; `--quick` tries a short context.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from posttrain.compress.sparse_attention import ChosenTokens
from posttrain.compress.token_labels import reads
from posttrain.native import slots


@dataclass(frozen=True)
class Figures:
    """ratio: of the medians of seconds, dense over sparse. read: numbers, dense over sparse, of a head with keys of its
    own. error: relative, of the outputs. mass: share of the dense attention weights on the chosen tokens. overlap:
    share of the chosen tokens that are among the truly largest.
    """

    dtype: str
    threads: int
    context: int
    tokens: int
    channels: int
    label_bits: int
    dense: float
    sparse: float
    ratio: float
    ratio_least: float
    ratio_most: float
    read: float
    error: float
    mass: float
    overlap: float


def cache(
    context: int, heads: int, key_heads: int, width: int, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A query, keys and values as trained heads have them: a quarter of the channels carries most of the scores, and
    few tokens carry most of the weight.
    """
    draw = torch.Generator().manual_seed(seed)
    scale = torch.ones(width)
    scale[torch.randperm(width, generator=draw)[: width // 4]] = 3.0
    query = torch.randn(1, heads, 1, width, generator=draw) * scale
    key = torch.randn(1, key_heads, context, width, generator=draw) * scale
    value = torch.randn(1, key_heads, context, width, generator=draw)
    return query.to(dtype), key.to(dtype).contiguous(), value.to(dtype).contiguous()


def dense(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """As the decode cache computes it: in C, or the heads of a group as rows of one product."""
    if slots.suits(query, query, query, key, value):
        last = torch.tensor([key.shape[2] - 1])
        return slots.attend(query, key[:, :, -1:], value[:, :, -1:], key, value, last, scale).transpose(1, 2)
    stacked = query.reshape(1, key.shape[1], -1, query.shape[-1])
    weights = torch.softmax((stacked @ key.transpose(-1, -2)).float() * scale, -1).to(value.dtype)
    return (weights @ value).view(query.shape)


def measured(
    context: int = 16384, heads: int = 8, key_heads: int = 8, width: int = 128, share: int = 16, factor: int = 4,
    repetitions: int = 20, dtype: torch.dtype = torch.bfloat16, aware: bool = True, label_bits: int = 4,
) -> Figures:  # fmt: skip
    """share: the tokens are a part of the context, one in so many. factor: one channel in so many is a label, in
    `label_bits`. aware: channels are those of the largest products, as calibration would choose them; else drawn.
    """
    query, key, value = cache(context, heads, key_heads, width, dtype)
    count, tokens, scale = width // factor, context // share, width**-0.5
    repeated = key.float().repeat_interleave(heads // key_heads, 1)
    products = (query.float() * repeated).abs().mean(2)[0]
    if not aware:
        products = torch.rand(products.shape, generator=torch.Generator().manual_seed(1))
    choice = ChosenTokens.of(products.topk(count, -1).indices.sort(-1).values, tokens, label_bits)
    labels, visible = choice.labels(key), torch.ones(1, 1, 1, context, dtype=torch.bool)
    sides: dict[str, Callable[[], Tensor]] = {
        "dense": lambda: dense(query, key, value, scale),
        "sparse": lambda: choice.attend(query, key, value, labels, visible, scale),
    }
    outputs = {name: side() for name, side in sides.items()}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(repetitions):
        for name, side in sides.items():
            begun = time.perf_counter()
            side()
            times[name].append(time.perf_counter() - begun)
    ratios = [a / b for a, b in zip(times["dense"], times["sparse"], strict=True)]
    scores = (query.float() @ repeated.transpose(-1, -2))[0, :, 0] * scale
    chosen, best = choice.pick(query, labels, visible)[0][0, :, 0], scores.topk(tokens, -1).indices
    is_best = torch.zeros(scores.shape, dtype=torch.bool).scatter_(1, best, True)
    middle = {name: statistics.median(found) for name, found in times.items()}
    return Figures(
        str(dtype).removeprefix("torch."), torch.get_num_threads(), context, tokens, count, label_bits,
        middle["dense"], middle["sparse"], middle["dense"] / middle["sparse"],
        min(ratios), max(ratios), 2 * context * width / reads(context, width, count, tokens, label_bits),
        float((outputs["sparse"] - outputs["dense"]).norm() / outputs["dense"].norm()),
        float(scores.softmax(-1).gather(1, chosen).sum(1).mean()),
        float(is_best.gather(1, chosen).float().mean()),
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--context", type=int, default=16384)
    parser.add_argument("--heads", type=int, nargs=3, default=(8, 8, 128), metavar=("HEADS", "KEY_HEADS", "WIDTH"))
    parser.add_argument("--share", type=int, default=16, help="one token in so many is attended to")
    parser.add_argument("--factor", type=int, default=4, help="one channel in so many is a label")
    parser.add_argument("--repetitions", type=int, default=20)
    parser.add_argument("--label-bits", type=int, default=4, help="of a channel in a label; 16 for as the keys are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--random", action="store_true", help="channels drawn, not chosen")
    parser.add_argument("--quick", action="store_true", help="a context of 1,024, twice")
    parser.add_argument("--json", help="where the figures go")
    given = parser.parse_args()
    context, repetitions = (1024, 2) if given.quick else (given.context, given.repetitions)
    heads, key_heads, width = given.heads
    with torch.inference_mode():
        found = measured(
            context, heads, key_heads, width, given.share, given.factor, repetitions, getattr(torch, given.dtype),
            not given.random, given.label_bits,
        )  # fmt: skip
    print(f"{found.threads} threads, {found.dtype}, context {found.context}, heads {given.heads}")
    print(f"dense   {found.dense * 1e3:8.3f} ms a step")
    chosen = f"{found.tokens} tokens by {found.channels} channels of {found.label_bits} bits"
    print(f"sparse  {found.sparse * 1e3:8.3f} ms a step, {chosen}")
    spread = f"[{found.ratio_least:.2f}, {found.ratio_most:.2f}]"
    print(f"ratio   {found.ratio:8.2f} {spread}; by what is read {found.read:.2f}")
    print(f"output  {found.error:8.4f} off; {found.mass:.4f} of the weight, {found.overlap:.4f} of the tokens")
    if given.json:
        Path(given.json).write_text(json.dumps(asdict(found), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
