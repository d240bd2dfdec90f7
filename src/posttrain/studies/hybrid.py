"""Demonstrations and rewards in one stage, against either alone and one after the other.

Most studies here share one setting, in which rewards alone are too rare: the lab model `rare-carries` writes sums out
column by column. It knows sums without a carry (success about 76 %), has hardly seen one carry (2 %), and never two. A
step takes 16 prompts, a third of each kind; arms with rewards draw 128 completions for them. So all arms see the same
prompts and make as many updates; those with rollouts spend more computation than imitation alone. Every arm has the
learning rate that was best for it on seed 100, which no study uses, out of 3e-4, 6e-4 and 1e-3 (RATES).
"""

from __future__ import annotations

from posttrain import methods
from posttrain.evaluation.task import Task
from posttrain.lab.worlds.arithmetic import style_of
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.rollout import rollout
from posttrain.studies.arms import in_lab, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Study
from posttrain.studies.verdict import AtMost, Better, Expectation, Lower, Within
from posttrain.training.method import Method, Pipeline
from posttrain.training.stage import Trained

STEPS, TOKENS, SEEDS = 100, 24, 4
RARE = "rare-carries"
RATES = {
    "sft": 1e-3,
    "grpo": 3e-4,
    "sft>>grpo": 6e-4,
    "luffy": 3e-4,
    "srft": 6e-4,
    "hpt": 6e-4,
    "ahpo": 6e-4,
    "visurf": 6e-4,
}


def _rare(method: Method | Pipeline, rate: float, **settings: int) -> Arm:
    made = in_lab(method, max_tokens=TOKENS, learning_rate=rate, **settings)
    return trained(made, preset=RARE, extra=gating)


def gating(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`gated_first`, `gated_last`: share of prompts that got their demonstration, over the first and last ten steps;
    nothing for methods without a gate.
    """
    found = [m["gated"] for m in result.metrics if "gated" in m]
    if not found:
        return {}
    first, last = found[:10], found[-10:]
    return {"gated_first": sum(first) / len(first), "gated_last": sum(last) / len(last)}


def _alone() -> dict[str, Arm]:
    """Rewards, demonstrations, and demonstrations before rewards."""
    return {
        "sft": _rare(methods.sft(), RATES["sft"]),
        "grpo": _rare(methods.grpo(), RATES["grpo"]),
        "sft>>grpo": _rare(methods.sft() >> methods.grpo(), RATES["sft>>grpo"], steps=STEPS // 2),
    }


def _luffy() -> Arm:
    return _rare(methods.luffy(), RATES["luffy"], group=7)


SETTING = (
    "lab model rare-carries (written sums with 0, 1 or 2 carries), 100 steps x 16 prompts, 8 completions a prompt "
    "where a method has rollouts, one demonstration a prompt where it has demonstrations"
)


@study(method="hpt", card="046")
def hpt() -> Study:
    """Imitate only what is never solved, learn the rest by trial: better than either, and than both in a row?

    HPT with gate 0 looks at the 8 completions of a prompt: where none is right, its demonstration is imitated instead,
    otherwise the completions are learned from. SFT, GRPO, SFT then GRPO (half the steps each) and LUFFY (7 completions
    and the demonstration in one group) are run on the same prompts with as many updates. The weight of imitation is
    0.3, the paper's for its smallest model; 1 was worse on seed 100.

    Rule, fixed before the run: HPT's held-out accuracy is above each of theirs; its pass@8 on the sums that the model
    could do before is not below GRPO's by more than 2 points; the share of prompts with a demonstration falls.
    """
    others = {**_alone(), "luffy": _luffy()}
    rules: tuple[Expectation, ...] = (
        *(Better("hpt", than=name, metric="accuracy", why="the paper's main comparison") for name in others),
        Better("hpt", than="grpo", metric="pass@8/plain", margin=-0.02, why="what is solved is left to rewards"),
        AtMost("hpt", metric="gated_last", value=0.5, why="two thirds of the prompts are not solved at first"),
    )
    return Study(
        claim="HPT beats SFT, GRPO, SFT followed by GRPO, and LUFFY at equal updates.",
        setting=f"{SETTING}, {SEEDS} seeds.",
        arms={**others, "hpt": _rare(methods.hpt(imitation=0.3, length=TOKENS), RATES["hpt"])},
        expectations=rules,
        seeds=SEEDS,
    )


@study(method="luffy", card="046")
def luffy() -> Study:
    """A demonstration in every group gives a signal where all rollouts fail.

    LUFFY (7 completions and the demonstration, probability shaping with γ = 0.1) and GRPO (8 completions) on sums that
    the model almost never does. Rule, fixed before the run: LUFFY's held-out accuracy is above GRPO's.
    """
    return Study(
        claim="LUFFY beats GRPO where the policy's own attempts seldom succeed.",
        setting=f"{SETTING}, {SEEDS} seeds.",
        arms={"grpo": _alone()["grpo"], "luffy": _luffy()},
        expectations=(Better("luffy", than="grpo", metric="accuracy"),),
        seeds=SEEDS,
    )


@study(method="srft", card="046")
def srft() -> Study:
    """Imitation and rewards at once, weighted with the policy's entropy.

    SRFT (7 completions and the demonstration) against GRPO and SFT. In the unified estimator's own comparison SRFT
    stands above GRPO and about level with SFT (44.2 against 43.1 and 44.5). Rule, fixed before the run: its held-out
    accuracy is above GRPO's, and not below SFT's by more than 3 points.
    """
    alone = _alone()
    return Study(
        claim="SRFT beats GRPO and is level with SFT.",
        setting=f"{SETTING}, {SEEDS} seeds.",
        arms={"sft": alone["sft"], "grpo": alone["grpo"], "srft": _rare(methods.srft(), RATES["srft"], group=7)},
        expectations=(
            Better("srft", than="grpo", metric="accuracy"),
            Better("srft", than="sft", metric="accuracy", margin=-0.03),
        ),
        seeds=SEEDS,
    )


@study(method="visurf", card="007")
def visurf() -> Study:
    """The label as one more sample of its group, whose advantage vanishes when a rollout matches it.

    ViSurf, the same without the smoothing of the label's reward (control 3), SFT, GRPO, and SFT then GRPO with half the
    steps each. Control 1 (spelling) has nothing to do on this text, control 2 (no credit for thinking) neither.

    Rule, fixed before the run: ViSurf's held-out accuracy is above that of SFT, of GRPO and of both in a row; without
    the smoothing the entropy is lower at the end.
    """
    alone = _alone()
    rules: tuple[Expectation, ...] = (
        *(Better("visurf", than=name, metric="accuracy", why="the paper's main comparison") for name in alone),
        Lower("unsmoothed", than="visurf", metric="entropy", why="a label that always wins draws all probability"),
    )
    return Study(
        claim="ViSurf beats SFT, GRPO, and SFT followed by GRPO.",
        setting=f"{SETTING}, {SEEDS} seeds.",
        arms={
            **alone,
            "visurf": _rare(methods.visurf(), RATES["visurf"]),
            "unsmoothed": _rare(methods.visurf(smooth=False), RATES["visurf"]),
        },
        expectations=rules,
        seeds=SEEDS,
    )


@study(method="ahpo", card="038")
def ahpo() -> Study:
    """Imitate a prompt's demonstration only while nobody solves it: learn the new, and keep the old.

    AHPO with R̂ = 1, the static sum of both losses (ξ = 1 for every prompt), GRPO, SFT and LUFFY. Sums without a carry
    are what the model knows already: AHPO imitates no demonstration of theirs once they are solved.

    Rule, fixed before the run: AHPO's held-out accuracy is above GRPO's and LUFFY's, and on sums without a carry above
    SFT's; on those with carries it is within 10 points of SFT's or above; the share of imitated prompts falls below 30
    %.
    """
    alone = _alone()
    rules: tuple[Expectation, ...] = (
        Better("ahpo", than="grpo", metric="accuracy", why="rewards alone are too rare"),
        Better("ahpo", than="luffy", metric="accuracy", why="the paper's comparison"),
        Better("ahpo", than="sft", metric="accuracy/plain", why="known tasks are left to rewards"),
        Better("ahpo", than="sft", metric="accuracy/one", margin=-0.1, why="the new is learned as by imitation"),
        AtMost("ahpo", metric="gated_last", value=0.3, why="the gate closes as prompts are solved"),
    )
    return Study(
        claim="AHPO learns what rewards alone cannot, and keeps what SFT loses.",
        setting=f"{SETTING}, {SEEDS} seeds.",
        arms={
            "sft": alone["sft"],
            "grpo": alone["grpo"],
            "luffy": _luffy(),
            "static sum": _rare(methods.ahpo(9), RATES["ahpo"]),
            "ahpo": _rare(methods.ahpo(), RATES["ahpo"]),
        },
        expectations=rules,
        seeds=SEEDS,
    )


# -- an expert with a style of its own -------------------------------------------------------------------------------


def writing(policy: CausalPolicy, task: Task, result: Trained) -> dict[str, float]:
    """`terse`, `spaced`: share of held-out completions in the model's own style and in the expert's. `dip`: the lowest
    accuracy on the way, relative to the first.
    """
    prompts = task.prompts(policy.tokenizer, "heldout", 96)
    groups = rollout(engine_for(policy, rows=256), prompts, 2, task.sampling, 0)
    found = [style_of(t.text) for g in groups for t in g.trajectories]
    curve = [point.figures["accuracy"] for point in result.curve]
    return {
        "terse": found.count("terse") / len(found),
        "spaced": found.count("spaced") / len(found),
        "dip": min(curve) - curve[0],
    }


def _styled(method: Method | Pipeline) -> Arm:
    return trained(method, preset="foreign-style", every=20, extra=writing)


@study(method=("chord", "chord-phi"), card="009")
def chord() -> Study:
    """An expert who writes differently: imitating first breaks the model's own way, then has to build another.

    The lab model `foreign-style` writes sums tersely (`103`, right in about 30 %) and has seen a little of the spaced
    style that the demonstrations are in (`ans: 1 0 3`); the verifier takes both. A step tries 16 prompts 8 times and
    shows 32 others, a share of 0.2 of its sequences, for CHORD-μ (0.9 to 0.05 over the run), CHORD-φ (μ = 0.1) and a
    constant μ = 0.5. GRPO tries the 16 alone, SFT is shown the 32 alone, SFT then GRPO do each for half of the steps.

    Rule, fixed before the run: CHORD-μ's held-out accuracy is above that of GRPO, of SFT and of both in a row. With
    CHORD-φ the accuracy dips less on its way than with the constant μ, and more completions stay in the model's style.
    """
    shared, half = {"batch": 48, "steps": STEPS}, STEPS // 2
    arms = {
        "grpo": _styled(in_lab(methods.grpo())),
        "sft": _styled(in_lab(methods.sft(), batch=32)),
        "sft>>grpo": _styled(in_lab(methods.sft(), batch=32, steps=half) >> in_lab(methods.grpo(), steps=half)),
        "constant": _styled(in_lab(methods.chord(0.5, 0.5), **shared)),
        "chord": _styled(in_lab(methods.chord(decay=STEPS), **shared)),
        "chord-phi": _styled(in_lab(methods.chord_phi(), **shared)),
    }
    rules: tuple[Expectation, ...] = (
        *(Better("chord", than=name, metric="accuracy", why="the claim") for name in ("grpo", "sft", "sft>>grpo")),
        Better("chord-phi", than="constant", metric="dip", why="shift and readaptation are avoided"),
        Better("chord-phi", than="constant", metric="terse", why="the model's own patterns survive"),
    )
    return Study(
        claim="CHORD beats GRPO, SFT and SFT followed by GRPO; its token weights keep the model's own way of writing.",
        setting="lab model foreign-style (terse sums; the expert's are spaced), 100 steps x 16 prompts x 8 "
        "completions, with 32 demonstrations of others beside them where a method imitates, 3 seeds.",
        arms=arms,
        expectations=rules,
    )


# -- the policy's own successes --------------------------------------------------------------------------------------


@study(method="raft", card="046")
def raft() -> Study:
    """Imitating one's own successes is nearly as good as GRPO, but failures keep the entropy up.

    A minimalist approach to LLM reasoning, 2025, arXiv 2504.11343, finds rejection sampling on a level with GRPO at
    first, and its entropy falling faster, for want of negative samples. Both on `tiers`, with the same rollouts.

    Rule, fixed before the run: RAFT's held-out accuracy is within 4 points of GRPO's, and its entropy is lower.
    """
    return Study(
        claim="Rejection sampling is on a level with GRPO, and loses entropy faster.",
        setting="lab model tiers, 100 steps x 16 prompts x 8 completions, 4 seeds.",
        arms={
            "grpo": trained(in_lab(methods.grpo()), preset="tiers"),
            "raft": trained(in_lab(methods.raft()), preset="tiers"),
        },
        expectations=(
            Within("raft", of="grpo", metric="accuracy", tolerance=0.04),
            Lower("raft", than="grpo", metric="entropy", why="there is no negative sample"),
        ),
        seeds=4,
    )
