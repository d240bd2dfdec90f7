"""Compression of a real model in full precision: does a sentence encoder still rank sentences as it did."""

from __future__ import annotations

import copy
import random

import torch
from scipy.stats import spearmanr
from torch import Tensor

from posttrain import methods
from posttrain.compress.method import Compression
from posttrain.compress.pipeline import compress_model
from posttrain.lab.encoder import REQUIREMENT, sentence_encoder, sentences
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better, Lower, Within

CALIBRATION, HELDOUT = 64, 120  # sentences
QUICK = (4, 12)
MODEL = (
    "the sentence encoder all-MiniLM-L6-v2 (BERT-style, 384 wide, trained by others in full precision); 64 sentences "
    "of calibration, 120 held-out ones of the same story; 5 draws of both."
)
DRAWS = 5


def encoded(method: Compression, *, calibration: int = CALIBRATION) -> Arm:
    """An arm that compresses the encoder's blocks by `method`, in fp32, and measures it beside the encoder as it was.

    There is one such model, so seeds are draws of text: calibration sentences of the story's first half, held-out ones
    of its second; arms of one seed share both. Figures: `ranking` (Spearman's correlation of the similarities of all
    pairs of held-out sentences, as the float and the compressed encoder see them), `neighbours` (share of sentences
    whose most similar one stays the same), `drift` (mean of one minus the cosine between a sentence's two embeddings),
    `bits` (stored, of a packed weight), `error` (relative, of a layer's weights, mean), `seconds`.

    calibration: sentences of it.
    """
    return Arm(run_encoded, {"method": method, "calibration": calibration, "model": REQUIREMENT})


def run_encoded(
    seed: int, quick: bool, *, method: Compression, calibration: int = CALIBRATION, model: str = ""
) -> Measured:
    """See `encoded`; `model` is the distribution that the encoder comes in."""
    seen, heldout = drawn(seed, *(QUICK if quick else (calibration, HELDOUT)))
    encoder = sentence_encoder()
    small = copy.deepcopy(encoder.model)
    done = compress_model(small, method, encoder.batches(seen), seed=seed)
    truth, found = encoder.embed(heldout), encoder.embed(heldout, small)
    figures = {
        **agreement(truth, found),
        "drift": float((truth - found).square().sum(-1).mean() / 2),  # one minus the cosine, without cancellation
        "bits": done.bits,
        "error": sum(layer.error for layer in done.layers) / len(done.layers),
        "seconds": done.seconds,
    }
    return Measured(figures, seconds=done.seconds)


def drawn(seed: int, calibration: int, heldout: int) -> tuple[list[str], list[str]]:
    """So many sentences of the story's first half, and of its second."""
    whole, draw = sentences(), random.Random(seed)
    middle = len(whole) // 2
    return draw.sample(whole[:middle], calibration), draw.sample(whole[middle:], heldout)


def agreement(truth: Tensor, found: Tensor) -> dict[str, float]:
    """How far two encoders rank pairs of sentences alike, from the embeddings `[n, width]` of each, of length 1."""
    once = torch.triu_indices(len(truth), len(truth), 1)
    ours, theirs = (similar[once[0], once[1]] for similar in (found @ found.T, truth @ truth.T))
    nearest = [(each @ each.T).fill_diagonal_(-2.0).argmax(-1) for each in (truth, found)]
    return {
        "ranking": float(spearmanr(ours.numpy(), theirs.numpy()).statistic),
        "neighbours": float((nearest[0] == nearest[1]).float().mean()),
    }


@study(method=("rtn", "gptq"), card="000")
def gptq_encoder() -> Study:
    """On weights in full precision GPTQ should lose less than rounding to nearest, and at 4 bits hardly anything.

    Groups of 128 columns, 384 being three of them; both with a zero point, GPTQ in order of activation. The calibration
    is small: 64 sentences are about 1,500 tokens, four for each input of a layer.

    Rule, fixed before the run: the embeddings drift less by GPTQ than by rounding to nearest at 4, 3 and 2 bits; at 3
    bits it ranks pairs better; at 4 bits its ranking agrees with the float one to at least 0.99.
    """
    bits = (4, 3, 2)
    arms = {f"rtn, {b} bits": encoded(methods.rtn(b, 128)) for b in bits}
    arms |= {f"gptq, {b} bits": encoded(methods.gptq(b, 128, act_order=True)) for b in bits}
    lower = tuple(
        Lower(f"gptq, {b} bits", than=f"rtn, {b} bits", metric="drift", why="later columns make up for errors")
        for b in bits
    )
    return Study(
        claim="GPTQ keeps a real encoder's embeddings closer than rounding to nearest does at 4, 3 and 2 bits, and at "
        "4 bits it ranks sentences as before.",
        setting=f"{MODEL} Weights alone, groups of 128.",
        seeds=DRAWS,
        arms=arms,
        expectations=(
            *lower,
            Better("gptq, 3 bits", than="rtn, 3 bits", metric="ranking", why="what the encoder is for"),
            AtLeast("gptq, 4 bits", metric="ranking", value=0.99, why="4 bits are said to be almost without loss"),
            Within("gptq, 3 bits", of="rtn, 3 bits", metric="bits", tolerance=0.05, why="equal bits"),
        ),
        notes="One model: the intervals speak of other text, not of other encoders.",
    )


@study(method=("crossquant", "llm-int8"), card="140")
def crossquant_encoder() -> Study:
    """Encoders of this kind have a few large channels by themselves: the same claim as `crossquant`, nothing planted.

    Weights have 8 bits, or 4 in groups of 128 (the paper's W4A8); activations a step a token (α = 1), or CrossQuant's
    (α = 0.15), with 8 and with 4 bits. `llm-int8` keeps the inputs beyond 6 as they are.

    Rule, fixed before the run: with activations of 4 bits, where steps are coarse, embeddings drift less by CrossQuant
    than by the token, and it ranks better; with 8 bits of both its ranking agrees with the float one to at least 0.99,
    and so does that of LLM.int8().
    """
    arms = {}
    for name, bits, group, inputs in (("W8A8", 8, 0, 8), ("W4A8", 4, 128, 8), ("W8A4", 8, 0, 4)):
        arms[f"{name} by token"] = encoded(methods.crossquant(bits, group, inputs, alpha=1.0))
        arms[f"{name} crossquant"] = encoded(methods.crossquant(bits, group, inputs))
    return Study(
        claim="On a real encoder CrossQuant's steps lose less than steps a token, and 8 bits of weights and "
        "activations leave the ranking of sentences as it is.",
        setting=f"{MODEL} W8A8, W4A8 and W8A4.",
        seeds=DRAWS,
        arms=arms | {"llm-int8": encoded(methods.llm_int8())},
        expectations=(
            Lower("W8A4 crossquant", than="W8A4 by token", metric="drift", why="fewer inputs are rounded to zero"),
            Better("W8A4 crossquant", than="W8A4 by token", metric="ranking", why="what the encoder is for"),
            AtLeast("W8A8 crossquant", metric="ranking", value=0.99, why="the paper's W8A8 is almost without loss"),
            AtLeast("llm-int8", metric="ranking", value=0.99, why="8 bits are enough beside the outliers"),
        ),
        notes="One model: the intervals speak of other text, not of other encoders.",
    )
