"""RL from a base model: which problems and rewards it needs, and what it makes of what pre-training left."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np

from posttrain import methods
from posttrain.data.domains import ByDomain
from posttrain.evaluation.behaviour import diagnose
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.formats import OTHER, format_metrics
from posttrain.evaluation.task import Task
from posttrain.lab import worlds
from posttrain.lab.models import ModelSpec, Share, World, build
from posttrain.lab.worlds.arithmetic import style_of
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies.arms import QUICK_PROMPTS, in_lab, pass_at, shortened, trained
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, AtMost, Better, Expectation, Lower, Within
from posttrain.training.method import Method
from posttrain.training.stage import train_stage

# -- zero RL: levels ---------------------------------------------------------------------------------------------------


def _on_level(name: str) -> Arm:
    plain = methods.zero_rl(level=None)
    return trained(in_lab(plain.replace(sampler=partial(ByDomain, weights={name: 1.0}))), preset="tiers")


@study(method="zero-rl", card="100")
def zero_rl() -> Study:
    """Zero RL wants problems that the base model solves sometimes.

    The lab model `tiers` is right on 90 % of easy sums, 40 % of medium ones and 5 % of hard ones. Arms train on one of
    these levels alone, on all of them, or on those that `zero-rl` chooses by trying 32 prompts of each level 4 times
    (10 % to 80 %). Each has 100 steps of 16 prompts x 8 completions; the probe's 384 completions (3 % more) are not
    taken off. Measured on all levels: 192 held-out problems, 8 samples each, over four seeds.

    Rule, fixed before the run: the chosen levels give a higher accuracy than easy problems alone and than hard problems
    alone, and hard problems alone leave accuracy on hard ones below 15 %.
    """
    return Study(
        claim="RL from a base model gains most on the level that it solves sometimes; problems that are too hard teach "
        "it little.",
        setting="lab model tiers, 100 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            **{name: _on_level(name) for name in ("easy", "medium", "hard")},
            "all": trained(in_lab(methods.zero_rl(level=None)), preset="tiers"),
            "matched": trained(in_lab(methods.zero_rl()), preset="tiers"),
        },
        expectations=(
            Better("matched", than="easy", metric="accuracy", why="nothing is left to learn there"),
            Better("matched", than="hard", metric="accuracy", why="hardly any completion is right there"),
            AtMost("hard", "accuracy/hard", 0.15, why="hard problems alone stay hard"),
        ),
        seeds=4,
    )


# -- three formats ---------------------------------------------------------------------------------------------------

_OPTIONS = {"digits": ((2, 2), (2, 2)), "carries": (1, 2)}


def _in_style(style: str) -> World:
    return World("styles", {**_OPTIONS, "style": style})


THREE_FORMATS = ModelSpec(
    "three-formats",
    _in_style("worked"),
    (Share(_in_style("terse"), 0.5), Share(_in_style("spaced"), 0.3), Share(_in_style("worked"), 0.2)),
    layers=2,
    until=0.35,
)
SAMPLES = 32


def answered(completion: str) -> str | None:
    """What a completion answers, in whichever format; None for one in none."""
    style = style_of(completion)
    if style is None:
        return None
    return completion.strip().removeprefix("ans: ").replace(" ", "") if style == "spaced" else completion.split()[-1]


def format_of(completion: str) -> str:
    """A completion's format, whether or not it is right."""
    return style_of(completion) or OTHER


def watched(seed: int, quick: bool, *, method: Method | None, spec: ModelSpec, every: int, model: str = "") -> Measured:
    """Train a model that knows several formats, and watch which of them it keeps.

    Figures, on 64 held-out problems with 32 samples each: the shares of formats and how often each is right, the
    shares' entropy, pass@1, pass@32, majority@32, and lengths. Curves: the same on 8 samples, every `every` steps.
    model: the key of what `spec` builds, so that a new model is a new arm.
    """
    policy = build(spec)
    task = spec.task.task(train=1500, heldout=150)

    def look(now: CausalPolicy, samples: int = 8) -> dict[str, float]:
        found = evaluate(
            engine_for(now, rows=256), now.tokenizer, task, samples=samples, limit=QUICK_PROMPTS if quick else 64
        )
        none = dict.fromkeys((f"format/{name}" for name in ("spaced", "terse", "worked")), 0.0)
        return none | format_metrics(found, format_of, ks=(1, samples), answer=answered) | lengths_of(found)

    if method is None:
        return Measured(look(policy, SAMPLES))
    result = train_stage(
        policy, shortened(method) if quick else method, task, seed=seed, evaluate=look, every=0 if quick else every
    )
    curves = {
        name: [{"step": p.step, "value": p.figures[name], "rollouts": p.rollouts} for p in result.curve]
        for name in ("format_entropy", "format/spaced", "format/terse", "format/worked", "pass@1")
    }
    return Measured(look(result.policy, SAMPLES), curves, result.rollouts, result.seconds, result.tokens)


def lengths_of(evaluation: Evaluation) -> dict[str, float]:
    """Mean length, that of completions that ended by themselves, and the share that was cut off."""
    wanted = ("length", "stopped_length", "truncation")
    return {name: v for name, v in diagnose(evaluation, ()).metrics().items() if name in wanted}


def _watched(method: Method | None) -> Arm:
    made = None if method is None else in_lab(method, max_tokens=24, group=8)
    arguments = {"method": made, "spec": THREE_FORMATS, "model": THREE_FORMATS.key, "every": 10}
    return Arm(watched, arguments, (format_metrics, style_of))


@study(method="zero-rl", card="100", name="zero-rl-format")
def zero_rl_format() -> Study:
    """A rigid format reward teaches the format, and costs what the model knows.

    A model of 0.2 million parameters is pre-trained on sums of two-digit numbers with carries, half of them answered
    tersely ("103"), a third spaced ("ans: 1 0 3") and a fifth with written working. Both arms are zero RL with the same
    prompts and 100 steps of 16 x 8 completions. One is paid for being right in any format; the other has the paper's
    rigid reward with `spaced` in the place of the box: 1, 0.5, -0.5, -1.

    Rule, fixed before the run: over four seeds, the rigid reward writes `spaced` at least nine times in ten, with a
    lower accuracy than the reward for being right alone.
    """
    free = methods.zero_rl(correct="answer", level=None)
    return Study(
        claim="A rigid format reward drives a base model into the format at the cost of accuracy.",
        setting="lab model of three formats, 100 steps x 16 prompts x 8 rollouts, equal for both arms.",
        arms={
            "before": _watched(None),
            "right": _watched(free),
            "rigid": _watched(methods.zero_rl(correct="answer", form="spaced", level=None)),
        },
        expectations=(
            AtLeast("rigid", "format/spaced", 0.9, why="the format is learned"),
            Lower("rigid", than="right", metric="pass@1", why="and what was known in other formats is lost"),
        ),
        seeds=4,
    )


@study(method="expert-iteration", card="121")
def echo_chamber() -> Study:
    """RL picks one of the formats that pre-training left, and drops the others.

    The model of three formats (see `zero-rl-format`): half of its corpus is terse, 0.3 spaced, 0.2 worked, entropy 1.03
    nats; the formats differ in how often they are right. Arms: GRPO without KL, GRPO with a KL weight of 0.05, expert
    iteration (two epochs over the right and different completions of each step), and the model before training. All
    have 100 steps of 16 prompts x 8 completions, at the same learning rate. 64 held-out sums, 32 samples each.

    Rule, fixed before the run, over four seeds: GRPO's entropy of formats falls below 0.3 nats; it stays higher with
    the KL and with expert iteration; against the model before, pass@1 is higher and pass@32 lower.
    """
    expectations: tuple[Expectation, ...] = (
        AtMost("grpo", "format_entropy", 0.3, why="one format takes nearly everything"),
        Better("grpo-kl", than="grpo", metric="format_entropy", why="a KL keeps the mixture"),
        Better("expert-iteration", than="grpo", metric="format_entropy", why="it changes the mixture more slowly"),
        Better("grpo", than="before", metric="pass@1", why="what is there is amplified"),
        Lower("grpo", than="before", metric="pass@32", why="and what is dropped is missed in many tries"),
    )
    return Study(
        claim="RL converges to one of the formats of pre-training: pass@1 rises, pass@32 falls; a KL or expert "
        "iteration keeps more of the mixture.",
        setting="lab model of three formats, 100 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "before": _watched(None),
            "grpo": _watched(methods.grpo()),
            "grpo-kl": _watched(methods.grpo(beta=0.05)),
            "expert-iteration": _watched(methods.expert_iteration()),
        },
        expectations=expectations,
        seeds=4,
    )


# -- word problems: steps, and what each stage contributes -------------------------------------------------------------

DEPTHS = {"id": (2, 3), "edge": (4, 4), "far": (6, 7)}
INTERPLAY = ModelSpec(
    "interplay",
    World("words", {"depth": (1, 3)}),
    (Share(World("words", {"depth": (1, 3)}), 0.95), Share(World("words", {"depth": DEPTHS["edge"]}), 0.05)),
    until=0.7,
    learning_rate=1.5e-3,
    steps=1600,
)


def on_depth(name: str) -> Task:
    """Word problems of one slice, paid by their outcome."""
    return worlds.words(depth=DEPTHS[name], train=1200, heldout=64)


def within_reach() -> Task:
    """The mixture of mid-training: a fifth uniform over all depths up to the edge, the rest on the edge."""
    low, high = DEPTHS["id"][0], DEPTHS["edge"][1]
    return worlds.mix(
        {
            "uniform": worlds.words(depth=(low, high), train=800, heldout=0, name="uniform"),
            "edge": worlds.words(depth=DEPTHS["edge"], train=3200, heldout=0, name="middle"),
        }
    )


@dataclass(frozen=True)
class Stage:
    """A stage of training: a method on the problems that a module's function makes."""

    method: Method
    problems: Callable[[], Task]


def through(
    seed: int,
    quick: bool,
    *,
    spec: ModelSpec,
    model: str,
    stages: tuple[Stage, ...],
    slices: Mapping[str, World],
    samples: int,
    prompts: int,
) -> Measured:
    """Train a model through stages, and verify its solutions step by step on slices of problems.

    Figures of every slice: `answer`, the share of right answers; `pass@1` and `pass@<samples>` of verified solutions
    (all steps and the answer right); `false_right`, the share of right answers by wrong steps (0 where none is right).
    model: the key of what `spec` builds.
    """
    policy = build(spec)
    rollouts, seconds, tokens = 0, 0.0, 0
    for i, stage in enumerate(stages):
        method = shortened(stage.method) if quick else stage.method
        done = train_stage(policy, method, stage.problems(), seed=seed * 100 + i)
        policy = done.policy
        rollouts, seconds, tokens = rollouts + done.rollouts, seconds + done.seconds, tokens + done.tokens
    figures: dict[str, float] = {}
    for name, world in slices.items():
        task = world.task(train=0, heldout=4 if quick else prompts)
        found = evaluate(engine_for(policy, rows=256), policy.tokenizer, task, samples=samples)
        right, verified = found.parts["answer"] > 0.5, found.parts["verified"] > 0.5
        figures |= {
            f"answer/{name}": float(right.mean()),
            f"pass@1/{name}": float(verified.mean()),
            f"pass@{samples}/{name}": pass_at(verified.astype(np.int64), samples),
            f"false_right/{name}": float((right & ~verified).sum() / max(1, right.sum())),
        }
    return Measured(figures, {}, rollouts, seconds, tokens)


def _through(stages: tuple[Stage, ...]) -> Arm:
    slices = {name: World("words", {"depth": depth}) for name, depth in DEPTHS.items()}
    arguments = {
        "spec": INTERPLAY, "model": INTERPLAY.key, "stages": stages, "slices": slices, "samples": 32, "prompts": 48,
    }  # fmt: skip
    return Arm(through, arguments, (worlds.words,))


def _rl(method: Method, steps: int) -> Method:
    made = in_lab(method, steps=steps, max_tokens=64)
    assert isinstance(made, Method)
    return made


@study(method="process-grpo", card="144")
def process_grpo() -> Study:
    """Paying the steps of right answers makes the steps right, and does not cost the answers.

    A model of 0.2 million parameters is pre-trained on word problems of up to three operations, whose solutions name
    every quantity, with 5 % of four operations (its edge), on which all arms train. They are GRPO with
    the same KL (0.001): on the outcome, on the card's process reward (0.2 and 0.8), and on the strict one. 60 steps of
    16 prompts x 8 completions each; 48 held-out problems of the edge, 32 samples each, over four seeds.

    Rule, fixed before the run: the process reward leaves a smaller share of right answers by wrong steps than the
    outcome alone, and its share of verified solutions is higher.
    """

    def arm(method: Method) -> Arm:
        return _through((Stage(_rl(method, 60), partial(on_depth, "edge")),))

    return Study(
        claim="A process reward gives more verified solutions and fewer right answers by wrong steps than the outcome.",
        setting="lab model of word problems, 60 steps x 16 prompts x 8 rollouts, equal for all arms.",
        arms={
            "outcome": arm(methods.grpo(beta=1e-3)),
            "process": arm(methods.process_grpo()),
            "strict": arm(methods.process_grpo(strict=True)),
        },
        expectations=(
            Lower("process", than="outcome", metric="false_right/edge", why="wrong steps cost most of the reward"),
            Better("process", than="outcome", metric="pass@1/edge", why="steps are learned sooner"),
        ),
        seeds=4,
    )


@study(method="process-grpo", card="144", name="interplay")
def interplay() -> Study:
    """What RL adds on, at and beyond the edge of what was pre-trained, and what mid-training adds before it.

    A model of 0.2 million parameters is pre-trained on word problems of one to three operations, with 5 % of four: so
    small a model does not write a longer solution than it has seen. Slices: its own (2-3 operations), the edge (4), far
    (6-7); solutions count as right only where every step is verified, and pass@32 says whether an ability is there at
    all. Arms: RL with the process reward on the edge (60 steps of 16 x 8), the same on the
    problems of pre-training, and mid-training (next-token prediction on solutions, a fifth uniform, the rest on the
    edge) followed by half of the RL. Equal compute: a token of RL costs 8P operations (2P to draw, 6P to learn from),
    one of mid-training 6P; 30 RL steps of about 128 x 40 tokens are 100 steps of 32 documents of about 60.

    Rule, fixed before the run, over three seeds: RL on the edge raises pass@32 there by at least 10 points, leaves
    it on far problems within 10 points, and RL on the problems of pre-training raises pass@1 there and leaves pass@32
    within 5 points; mid-training and half the RL give a higher pass@32 on the edge than RL alone.
    """
    reward = methods.process_grpo()
    middle = in_lab(methods.sft(), steps=100, batch=32, epochs=None)
    assert isinstance(middle, Method)
    edge = partial(on_depth, "edge")
    return Study(
        claim="RL raises pass@32 only on the edge of what was pre-trained; at equal compute, mid-training with less RL "
        "does better there.",
        setting="lab model of word problems; 60 RL steps x 16 prompts x 8 rollouts, or 100 steps of mid-training on 32 "
        "documents and 30 of RL, which cost about the same.",
        arms={
            "before": _through(()),
            "rl-edge": _through((Stage(_rl(reward, 60), edge),)),
            "rl-id": _through((Stage(_rl(reward, 60), partial(on_depth, "id")),)),
            "mid-rl": _through((Stage(middle, within_reach), Stage(_rl(reward, 30), edge))),
        },
        expectations=(
            Better("rl-edge", than="before", metric="pass@32/edge", margin=0.1, why="a new ability, on the edge"),
            Within("rl-edge", of="before", metric="pass@32/far", tolerance=0.1, why="none far beyond it"),
            Better("rl-id", than="before", metric="pass@1/id", why="what is there is amplified"),
            Within("rl-id", of="before", metric="pass@32/id", tolerance=0.05, why="and nothing new appears"),
            Better("mid-rl", than="rl-edge", metric="pass@32/edge", why="mid-training prepares the ground"),
        ),
        seeds=3,
    )
