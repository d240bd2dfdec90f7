"""Training in fewer bits: which ones it misses, and at which learning rates it stays stable."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

from posttrain import methods
from posttrain.lab import text
from posttrain.lab.models import ModelSpec, World, initial
from posttrain.models.causal import CausalPolicy
from posttrain.models.float_format import FloatFormat
from posttrain.models.simulated import SimulatedPrecision
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import Better, Expectation, Lower, Within
from posttrain.training.method import Method
from posttrain.training.stability import StabilityRun, stability_grid

RATE = 3e-3  # of the lab's language models
MULTIPLES = (1, 3, 10)
STEPS, BATCH, PAGE = 150, 8, 128  # steps, pages a step, tokens a page
ROWS, WATCHED, EVERY = 1200, 16, 15  # pages, those that sharpness is measured on, and how often


@study(method="reduced-precision", card="157")
def reduced_precision() -> Study:
    """Mantissa bits that are cut off should cost a little each, exponent bits much, and high rates show it first.

    A language model of two layers is trained from nothing on pages of the lab, as the card's check has it, in fp32, in
    bf16 (E8M7), with five and three bits of mantissa, rounded towards 0 as the paper's mask does; with three rounded to
    nearest, and cut in the forward pass alone; with a bit of exponent less (E7M7, its range clipped), and with three
    less (E5M7). Each runs at the lab's rate and at 3 and 10 times that. `loss` is the mean of the last ten steps at the
    lab's rate; a run that ends without a number counts as one that has learned nothing, with its first loss. `stable`
    is the largest multiple of the rate up to which the run did not diverge (0, 1, 3 or 10).

    The paper's E7M7 failed soon in models of billions of weights whose gradients are scaled down by millions of tokens
    a step; here nothing comes near 2^-62, so that the same claim is tested by E5M7, which starts to lose numbers at
    2^-14, a size that gradients here do have; and against E8M3, which has a bit less in all. The two arms that the
    card names beside (nearest, forward alone) tell bias and the backward pass apart. Truncation shrinks every operand
    by up to 2^-m of it, and a layer's output by about twice the mean of that, which norms and Adam may well undo.

    Rule, fixed before the run, for the loss at the lab's rate: bf16 within 0.02 nats of fp32; bf16 no higher than E8M5
    by more than 0.02; E8M5 below E8M3; E8M3 to nearest below E8M3 cut; E8M3 below E5M7. And bf16 stable up to a larger
    rate than E8M3.
    """
    formats: dict[str, SimulatedPrecision | None] = {
        "fp32": None,
        "bf16": cut(8, 7),
        "e8m5": cut(8, 5),
        "e8m3": cut(8, 3),
        "e8m3, nearest": SimulatedPrecision(FloatFormat(8, 3, beyond="largest")),
        "e8m3, forward": SimulatedPrecision(FloatFormat(8, 3, "truncate"), passes="forward"),
        "e7m7": cut(7, 7, subnormals=False),
        "e5m7": cut(5, 7, subnormals=False),
    }
    claims: tuple[Expectation, ...] = (
        Within("bf16", of="fp32", metric="loss", tolerance=0.02, why="seven bits of mantissa are enough"),
        Lower("bf16", than="e8m5", metric="loss", margin=-0.02, why="two bits less cost something, if anything"),
        Lower("e8m5", than="e8m3", metric="loss", why="and two more cost more"),
        Lower("e8m3, nearest", than="e8m3", metric="loss", why="cutting off makes all numbers smaller"),
        Lower("e8m3", than="e5m7", metric="loss", why="exponent bits are the critical ones"),
        Better("bf16", than="e8m3", metric="stable", why="fewer bits leave less room for a high rate"),
    )
    return Study(
        claim="Training tolerates missing mantissa bits in part and missing exponent bits hardly, and with fewer bits "
        "it diverges at lower learning rates.",
        setting=f"a Llama of 2 layers of width 128 from its initial weights, {STEPS} steps of {BATCH} pages of {PAGE} "
        f"tokens, AdamW at {RATE:g} and 3 and 10 times that; the seed makes weights and the order of pages.",
        arms={name: trained_in(precision) for name, precision in formats.items()},
        expectations=claims,
        notes="The formats are simulated in the products of linear layers; sums, norms, softmax and the optimizer are "
        "fp32. Sharpness is that of the last token of 16 held-out pages, every fifteen steps.",
    )


def cut(exponent: int, mantissa: int, subnormals: bool = True) -> SimulatedPrecision:
    """The precision that the method has, towards 0."""
    made = methods.reduced_precision(exponent, mantissa, subnormals=subnormals).precision
    assert made is not None
    return made


def trained_in(precision: SimulatedPrecision | None, rate: float = RATE, steps: int = STEPS) -> Arm:
    """An arm that trains a small language model from nothing in a precision, at several rates.

    Figures: `loss` and, by multiple, `loss x3`, `loss x10`; `stable`; `diverged` (share of the rates), `spikes` (mean
    over rates) and `sharpness` (at the end, at the lowest rate). Curves: loss and sharpness at the highest rate.
    """
    from posttrain import lab

    arguments = {"precision": precision, "rate": rate, "steps": steps, "model": lab.preset("mixed").key}
    return Arm(run_trained_in, arguments, (stability_grid, small, recipe))


def run_trained_in(
    seed: int, quick: bool, *, precision: SimulatedPrecision | None, rate: float, steps: int, model: str = ""
) -> Measured:
    """See `trained_in`; `model` is the lab's key of the worlds and models that it is made of."""
    rows, every, multiples = (64, 1, MULTIPLES[::2]) if quick else (ROWS, EVERY, MULTIPLES)
    steps = 2 if quick else steps
    task = World("pages").task(train=rows, heldout=0)
    watched = text.heldout(small(), 4 if quick else WATCHED)
    grid = stability_grid(
        partial(untrained, small()), recipe(steps), task, {"": precision}, [m * rate for m in multiples], seeds=(seed,),
        watched=watched, every=every,
    )  # fmt: skip
    first, *others = grid.runs
    figures = {
        "loss": final(first),
        **{f"loss x{m}": final(run) for m, run in zip(multiples[1:], others, strict=True)},
        "stable": float(round(grid.largest_stable_rate("") / rate)),
        "diverged": sum(run.diverged is not None for run in grid.runs) / len(grid.runs),
        "spikes": sum(run.spikes for run in grid.runs) / len(grid.runs),
        "sharpness": first.sharpness[-1][1],
    }
    return Measured(figures, curves(grid.runs[-1], multiples[-1]), tokens=len(grid.runs) * steps * BATCH * PAGE)


def final(run: StabilityRun) -> float:
    """The loss at the end, or at the beginning where it has ended without a number."""
    return run.final if math.isfinite(run.final) else run.losses[0]


def curves(run: StabilityRun, multiple: int) -> dict[str, list[dict[str, float]]]:
    """Loss and sharpness along a training, where they are numbers."""
    losses = [(step, run.losses[step]) for step in range(0, len(run.losses), EVERY)]
    return {
        f"{name} at {multiple} x the rate": [{"step": float(s), "value": v} for s, v in points if math.isfinite(v)]
        for name, points in (("loss", losses), ("sharpness", run.sharpness))
    }


def small() -> ModelSpec:
    """A language model of two layers, as wide as the lab's."""
    from posttrain import lab

    return dataclasses.replace(lab.preset("mixed"), name="small", layers=2)


def untrained(spec: ModelSpec, seed: int) -> CausalPolicy:
    return initial(dataclasses.replace(spec, seed=seed))


def recipe(steps: int) -> Method:
    """How all are trained, but for the precision and the rate."""
    return methods.sft().with_settings(
        steps=steps, batch=BATCH, schedule="constant", warmup=min(1.0, 20 / steps), betas=(0.9, 0.98),
        weight_decay=0.01, token_budget=8192,
    )  # fmt: skip
