"""Weights and tokens left out: does what each method looks at keep more of the model at the same sparsity."""

from __future__ import annotations

from dataclasses import replace

import torch

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.studies.arms import heldout_figures, in_lab, shortened, trained
from posttrain.studies.compression import compressed
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtMost, Better, Lower, Within
from posttrain.training.method import Method, Pipeline, stages_of
from posttrain.training.stage import train_stage
from posttrain.training.weights import KeepZeros, pruned

MODEL = "lab model mixed (layers of 128 and 256 columns), 128 pages of calibration; 3 models."


@study(method=("magnitude", "wanda", "sparsegpt"), card="000")
def one_shot_pruning() -> Study:
    """At equal sparsity, looking at inputs should lose less than not looking, and making up for what goes less again.

    Half of the weights go, anywhere and 2:4. Wanda's claim is against magnitude, SparseGPT's against both. The pattern
    leaves less choice, so each method should lose more with it. Wanda's ablation compares weights with those of their
    layer; magnitude in each row tells how much of Wanda's gain is the comparison alone. A model this small has few
    weights to spare, so that half of them cost more than in the papers'; the order is what is claimed.

    Rule, fixed before the run: by the divergence from the float model, Wanda below magnitude (of the layer and of each
    row) and SparseGPT below Wanda, both without a pattern and with 2:4; Wanda without a pattern below Wanda with it.
    """
    return Study(
        claim="At equal sparsity SparseGPT loses less than Wanda, and Wanda less than magnitude.",
        setting=MODEL,
        arms={
            "magnitude": compressed(methods.magnitude()),
            "magnitude, rows": compressed(methods.magnitude(across="row")),
            "wanda, layer": compressed(methods.wanda(across="layer")),
            "wanda": compressed(methods.wanda()),
            "sparsegpt": compressed(methods.sparsegpt()),
            "magnitude, 2:4": compressed(methods.magnitude(pattern="2:4")),
            "wanda, 2:4": compressed(methods.wanda(pattern="2:4")),
            "sparsegpt, 2:4": compressed(methods.sparsegpt(pattern="2:4")),
        },
        expectations=(
            Lower("wanda", than="magnitude", metric="kl", why="a weight matters as much as its input is large"),
            Lower("wanda", than="magnitude, rows", metric="kl", why="and not for the comparison in rows alone"),
            Lower("sparsegpt", than="wanda", metric="kl", why="what stays makes up for what goes"),
            Lower("wanda, 2:4", than="magnitude, 2:4", metric="kl", why="as without a pattern"),
            Lower("sparsegpt, 2:4", than="wanda, 2:4", metric="kl", why="as without a pattern"),
            Lower("wanda", than="wanda, 2:4", metric="kl", why="a pattern leaves less choice"),
            Within("sparsegpt", of="magnitude", metric="bits", tolerance=0.01, why="equal sparsity"),
        ),
    )


@study(method="double-sparsity", card="146")
def double_sparsity() -> Study:
    """The tokens that half of the channels choose should do for all of them, and drawn channels should not.

    Pages of 128 tokens are read with 16 tokens a query (an eighth), in every layer. Log-probabilities are computed as
    if every token were decoded, which is harsher than decoding behind a prompt. `all channels` chooses by exact scores,
    the best that there is to choose by; `newest` are the last 16 tokens, which need no labels at all; a quarter of the
    channels with four bits is the paper's setting. In heads this narrow a quarter of the channels is few.

    Rule, fixed before the run: by the divergence from the float model, calibrated channels below drawn ones (at a half
    and at a quarter of them) and below the newest tokens; for half of the channels at most 0.05 nats (a rise of
    perplexity of 5 %).
    """
    tokens = 16
    return Study(
        claim="Few calibrated channels find the tokens that attention needs: an eighth of the tokens loses little.",
        setting=f"{MODEL} Pages of 128 tokens, {tokens} attended to.",
        arms={
            "newest": compressed(methods.double_sparsity(tokens, 2, 16, dense=0, recent=tokens)),
            "drawn": compressed(methods.double_sparsity(tokens, 2, 16, "random", dense=0)),
            "all channels": compressed(methods.double_sparsity(tokens, 1, 16, dense=0)),
            "double sparsity": compressed(methods.double_sparsity(tokens, 2, 16, dense=0)),
            "a quarter drawn": compressed(methods.double_sparsity(tokens, 4, 4, "random", dense=0)),
            "a quarter": compressed(methods.double_sparsity(tokens, 4, 4, dense=0)),
        },
        expectations=(
            Lower("double sparsity", than="drawn", metric="kl", why="which channels matter is nearly fixed in a head"),
            Lower("a quarter", than="a quarter drawn", metric="kl", why="the same with fewer of them"),
            Lower("double sparsity", than="newest", metric="kl", why="what matters is not only near"),
            AtMost("double sparsity", metric="kl", value=0.05, why="a rise of perplexity of 5 %, as card 146 has it"),
        ),
    )


@study(method="granet", card="088")
def granet() -> Study:
    """Pruning little by little should be better than at once, and better still where connections come back elsewhere.

    All arms are 100 steps of SFT on the task, to 80 % sparsity, with equal masks' sizes and the same rows. Gradual
    pruning (GMP) is GraNet without regrowth; RigL starts at 80 % and only moves its connections; at once prunes in the
    first event. The paper's gaps are half a point to three at 98 %, where networks of millions of weights are as tight
    as this one is at 80 %. Three seeds of a task with 192 problems may not tell half a point.

    Rule, fixed before the run: GraNet's accuracy above that of gradual pruning, and that of gradual pruning above that
    of pruning at once; GraNet above RigL.
    """

    def arm(**options: float) -> Arm:
        made = methods.granet(**{"sparsity": 0.8, "every": 5, **options})  # type: ignore[arg-type]
        return trained(in_lab(made, rows=1600, learning_rate=1e-3))

    return Study(
        claim="At equal sparsity, gradual pruning with regrowth is better than without, and than pruning at once.",
        setting="lab model tiers, 100 steps of 16 demonstrations; 80 % of the weights of its blocks gone.",
        arms={
            "at once": arm(end=0.0, regrow=0.0),
            "gradual": arm(regrow=0.0),
            "rigl": arm(initial=0.8),
            "granet": arm(),
            "granet from half": arm(initial=0.5),
        },
        expectations=(
            Better("granet", than="gradual", metric="accuracy", why="the paper's main result"),
            Better("gradual", than="at once", metric="accuracy", why="what is left adapts"),
            Better("granet", than="rigl", metric="accuracy", why="it starts from a whole model"),
        ),
    )


@study(method="paser", card="141")
def paser() -> Study:
    """A tenth of the rows, chosen where a pruned model departed most, should recover more of it than a random tenth.

    Half of the weights of the lab's language model go by size, which hurts its worlds unevenly, and stay gone. All arms
    then train for 60 steps of 16 rows: on a tenth of 1,000 rows as they come, on as many chosen by PASER, chosen
    without the filter of concepts, or without clusters; and on all rows. The rows are short solutions of few words,
    among which concepts clash often, so the filter may cost more than it brings.

    Rule, fixed before the run: PASER's accuracy above that of the random tenth and of no recovery, its divergence from
    the model before pruning below the random tenth's.
    """
    whole = {"rows": 1000, "steps": 60}
    random = methods.sft().replace(weight_rule=KeepZeros())
    return Study(
        claim="Rows chosen by divergence in every cluster recover more of a pruned model than as many random ones.",
        setting="lab model mixed, half of its weights gone; 60 steps of 16 rows, chosen among 1,000.",
        arms={
            "not recovered": recovered(None),
            "random": recovered(in_lab(random, rows=100, steps=60)),
            "no clusters": recovered(in_lab(methods.paser(share=0.1, clusters=1), **whole)),
            "no concepts": recovered(in_lab(methods.paser(share=0.1, concepts=False), **whole)),
            "paser": recovered(in_lab(methods.paser(share=0.1), **whole)),
            "all rows": recovered(in_lab(random, **whole)),
        },
        expectations=(
            Better("paser", than="random", metric="accuracy", why="the paper's main result"),
            Better("paser", than="not recovered", metric="accuracy", why="it recovers at all"),
            Lower("paser", than="random", metric="divergence", why="rows are chosen by it"),
        ),
    )


def recovered(method: Method | Pipeline | None, *, share: float = 0.5, prompts: int = 192, models: int = 3) -> Arm:
    """An arm that prunes the lab's language model by size, in place, and lets it recover by a method.

    Figures: `accuracy` (greedy, on held-out problems), `divergence` (Jensen–Shannon, nats a token of the answers of 200
    training rows, from the model before pruning), and what the choice of rows tells (`recovery/...`). share: of the
    weights that go. models: how many seeds of the model there are.
    """
    from posttrain import lab

    arguments = {
        "method": method, "preset": "mixed", "model": lab.preset("mixed").key, "share": share, "prompts": prompts,
        "models": models,
    }  # fmt: skip
    return Arm(run_recovered, arguments, (zero_smallest,))


def run_recovered(
    seed: int,
    quick: bool,
    *,
    method: Method | Pipeline | None,
    preset: str,
    share: float,
    prompts: int,
    models: int = 3,
    model: str = "",
) -> Measured:
    """See `recovered`; `model` is the preset's key in the lab."""
    from posttrain import lab
    from posttrain.data.recovery import Recovery, divergences

    policy = lab.model(preset, seed % models)
    teacher, task, rows = policy.frozen_copy(), lab.task(preset), 200
    zero_smallest(policy, share)
    figures: dict[str, float] = {}
    seconds, tokens = 0.0, 0
    if quick:
        prompts, rows = 8, 16
    if method is not None:
        stage = stages_of(shortened(method) if quick else method)[0]
        if quick:
            stage = stage.with_settings(rows=min(stage.settings.rows or 64, 64))
        if getattr(stage.sampler, "func", None) is Recovery:
            stage = replace(stage, teacher=teacher)
        result = train_stage(policy, stage, task, seed=seed)
        policy, seconds, tokens = result.policy, result.seconds, result.tokens
        figures |= {name: value for name, value in result.metrics[0].items() if name.startswith("recovery/")}
    figures["divergence"] = float(divergences(policy, teacher, task.demonstrations(policy.tokenizer, rows)).mean())
    figures["accuracy"] = heldout_figures(policy, task, samples=1, ks=(1,), prompts=prompts)["accuracy"]
    return Measured(figures, seconds=seconds, tokens=tokens)


@torch.no_grad()
def zero_smallest(policy: CausalPolicy, share: float) -> None:
    """Set the smallest weights of each linear layer in the blocks to 0."""
    named = dict(policy.model.named_parameters())
    for name in pruned(policy):
        weight = named[name]
        gone = weight.abs().flatten().argsort()[: round(share * weight.numel())]
        weight.view(-1)[gone] = 0.0
