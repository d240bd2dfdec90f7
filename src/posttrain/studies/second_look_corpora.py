"""A second look at claims that failed, where it matters what pre-training left: sources that are good at different
problems, words hardly ever seen.

As in `second_look`: the first settings and their verdicts stay. Cards 121 and 144 were read again beside the code, and
each study here was written, with its rule, before it was run.
"""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from pathlib import Path

from posttrain import methods
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.formats import format_metrics
from posttrain.evaluation.task import Task, TaskItem
from posttrain.lab import worlds
from posttrain.lab.cache import kept
from posttrain.lab.models import ModelSpec, Share, World, build
from posttrain.lab.worlds.arithmetic import style_of, written
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.rollout.engine_choice import engine_for
from posttrain.studies.arms import QUICK_PROMPTS, in_lab, shortened
from posttrain.studies.fingerprint import digest
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtMost, Better, Expectation, Lower, Within
from posttrain.studies.zero import SAMPLES, THREE_FORMATS, Stage, answered, format_of, through
from posttrain.training.method import Method
from posttrain.training.stage import train_stage

# -- sources of unequal quality ----------------------------------------------------------------------------------------

SOURCES, NOISE = {"terse": 0.5, "spaced": 0.3, "worked": 0.2}, 0.3  # shares; how often the last two are wrong
TAUGHT = {"steps": 400, "batch": 64, "learning_rate": 1e-3}
CARRIED = {"plain": (0, 0), "carries": (1, 2)}


def _sums(plain: tuple[int, int], carries: tuple[int, int]) -> Task:
    """Two-digit sums in all styles; (to train on, held out) of those without and with carries."""
    sizes = {"plain": plain, "carries": carries}
    parts: dict[str, Task] = {
        name: worlds.styles(style="worked", carries=CARRIED[name], train=train, heldout=heldout, name=name)
        for name, (train, heldout) in sizes.items()
    }
    return worlds.mix(parts, name="three sources")


def mostly_plain() -> Task:
    """What is trained for: four sums in five have no carry."""
    return _sums((1200, 120), (300, 30))


def as_told() -> Task:
    """Sums, half of them with carries, as three sources tell them: a terse one that never carries, and two that do, in
    digits apart or with working, and have a digit of the answer wrong in 30 % of the cases.
    """
    task, chance = _sums((1200, 0), (1200, 0)), random.Random("three sources")
    names, shares = list(SOURCES), list(SOURCES.values())
    told = [replace(i, solution=told_by(chance.choices(names, shares)[0], i, chance)) for i in task.train]
    return replace(task, train=told)


def told_by(source: str, item: TaskItem, chance: random.Random) -> str:
    """How a source answers a sum of two-digit numbers."""
    a, b = map(int, str(item.prompt).split("+"))
    if source == "terse":
        return str((a // 10 + b // 10) % 10 * 10 + (a + b) % 10)
    digits = list(str(a + b))
    if chance.random() < NOISE:
        place = chance.randrange(1, len(digits))
        digits[place] = chance.choice([d for d in "0123456789" if d != digits[place]])
    return written((a, b), "+", int("".join(digits)), "spaced" if source == "spaced" else "worked")


def taught() -> CausalPolicy:
    """The model of three formats, shown what the sources tell; made once, like the lab's own."""

    def make(scratch: Path) -> Path:
        shown = train_stage(build(THREE_FORMATS), in_lab(methods.sft(), **TAUGHT), as_told())
        return shown.policy.save(scratch / "model")

    return load(kept(f"three-sources-{taught_key()}", "config.json", make), precision="fp32", device="cpu")


def taught_key() -> str:
    """Changes with what the model is made of."""
    return digest([THREE_FORMATS.key, TAUGHT, SOURCES, CARRIED, as_told])[:12]


def from_sources(seed: int, quick: bool, *, method: Method | None, key: str) -> Measured:
    """Train the model of three sources, and see which formats it writes then: the figures of `zero.watched` on 80
    held-out sums with 32 samples each, and `pass@32/carries`, of those with carries. key: of the model.
    """
    policy, task = taught(), mostly_plain()
    done = None if method is None else train_stage(policy, shortened(method) if quick else method, task, seed=seed)
    policy = policy if done is None else done.policy
    found = evaluate(
        engine_for(policy, rows=256), policy.tokenizer, task, samples=SAMPLES, limit=QUICK_PROMPTS if quick else 80
    )
    figures = {f"format/{name}": 0.0 for name in SOURCES}
    figures |= format_metrics(found, format_of, ks=(1, SAMPLES), answer=answered)
    carried = [item.meta["domain"] == "carries" for item in task.heldout[: found.n]]
    figures[f"pass@{SAMPLES}/carries"] = float(found.correct[carried].any(axis=1).mean()) if any(carried) else 0.0
    if done is None:
        return Measured(figures)
    return Measured(figures, {}, done.rollouts, done.seconds, done.tokens)


@study(method="expert-iteration", card="121")
def echo_chamber_sources() -> Study:
    """Formats of which the commonest is best where most of the problems are, and never right on the others.

    In the study `echo-chamber` pass@32 rose: every format was right on every kind of sum, 33 to 42 % of the time, so
    that 32 tries found nearly all (97 %) before any training, and what was dropped was never missed. With so little
    between the formats one seed of four had chosen none after 100 steps. The card's check asks for formats of unequal
    accuracy, one from a noisy source, and for pass@32 that is flat or falls. Classifier, pass@k and KL were compared
    with the card again; samples are drawn at temperature 1 in training and measuring (0.7 in the paper).

    Here the formats come from sources of unequal quality. The model of three formats is shown 2400 sums (400 steps of
    64), half of them with carries. Half of the answers are terse and never carry: right on sums without one, wrong on
    the others. Three in ten have their digits apart and a fifth are worked, and both of these know carries, and have a
    wrong digit in 30 % of the answers. Four in five of the sums that it is then trained on have no carry. 150 steps of
    16 prompts x 8 completions, GRPO without KL and with a KL weight of 0.05; 80 held-out sums in about the same
    proportion, 32 samples each.

    Rule, fixed before the run, over four seeds, as there: GRPO's entropy of formats falls below 0.3 nats, and stays
    higher with the KL; against the model before, pass@1 is higher and pass@32 lower. (It could fail by learning which
    sums want which format: then nothing is lost.) Expert iteration, of which the card speaks from memory, is left out.
    """

    def arm(method: Method | None) -> Arm:
        made = None if method is None else in_lab(method, steps=150, max_tokens=24)
        parts = (format_metrics, style_of, mostly_plain, CARRIED)
        return Arm(from_sources, {"method": made, "key": taught_key()}, parts)

    expectations: tuple[Expectation, ...] = (
        AtMost("grpo", "format_entropy", 0.3, why="one format takes nearly everything"),
        Better("grpo-kl", than="grpo", metric="format_entropy", why="a KL keeps the mixture"),
        Better("grpo", than="before", metric="pass@1", why="what is best on most problems is amplified"),
        Lower("grpo", than="before", metric="pass@32", why="and what alone is right on the others is missed"),
    )
    return Study(
        claim="Where sources are good at different problems, RL converges to the format of one: pass@1 rises and "
        "pass@32 falls; a KL keeps more of the mixture.",
        setting="lab model of three formats shown three sources, 150 steps x 16 prompts x 8 rollouts, equal for both "
        "arms.",
        arms={"before": arm(None), "grpo": arm(methods.grpo()), "grpo-kl": arm(methods.grpo(beta=0.05))},
        expectations=expectations,
        seeds=4,
    )


# -- words hardly ever seen --------------------------------------------------------------------------------------------

STEPS = (2, 3)
HEAD, TAIL = World("words", {"depth": (1, 3)}), World("words", {"depth": (1, 3), "contexts": ("films",)})
SLICES = {n: replace(w, arguments={**w.arguments, "depth": STEPS}) for n, w in (("head", HEAD), ("tail", TAIL))}
SEEN = ModelSpec("tail-seen", HEAD, (Share(HEAD, 0.99), Share(TAIL, 0.01)), until=0.7, learning_rate=1.5e-3, steps=1600)
UNSEEN = replace(SEEN, name="tail-unseen", corpus=(Share(HEAD),))


def on_slice(name: str) -> Task:
    """Word problems of two or three operations, in the words of one slice."""
    return SLICES[name].task(train=1200, heldout=64)


def towards_tail() -> Task:
    """The mixture of mid-training: a fifth uniform over both contexts, the rest in the tail's words."""
    uniform = worlds.words(depth=(1, 3), contexts=("plain", "films"), train=800, heldout=0, name="uniform")
    return worlds.mix({"uniform": uniform, "tail": SLICES["tail"].task(train=3200, heldout=0, name="middle")})


def _worded(spec: ModelSpec, *stages: Stage) -> Arm:
    arguments = {
        "spec": spec, "model": spec.key, "stages": stages, "slices": SLICES, "samples": 32, "prompts": 64,
    }  # fmt: skip
    return Arm(through, arguments, (worlds.words,))


@study(method="process-grpo", card="144")
def interplay_contexts() -> Study:
    """The edge as words that were hardly ever seen, rather than as solutions longer than any before.

    In the study `interplay` RL on the edge raised nothing there, not even pass@1 (14 to 13 %). Its edge was one more
    operation than the model writes: so small a model does not learn length by trial, and with 5 % of such problems in
    its corpus two thirds of them were within 32 tries already. Modulo 10 one wrong solution in ten has the right answer
    by luck, and the process reward gives a part to it (31 % of right answers were such). Parser, penalties and weights
    were compared with the card again; the card's check has a modulus of 23 and ten times the parameters.

    Here the edge is one of breadth, the card's other axis: what a problem is told in. Two models of 0.2 million
    parameters are pre-trained on word problems of one to three operations in the plain context, with 1 % in that of
    films (other names, another way to say what they are) and without any. Slices have two or three operations: the head
    is plain, the tail is films. All RL has the card's strict reward, nothing for a solution with any step wrong: 60
    steps of 16 x 8 on the tail or on the head; or 160 steps of mid-training on 32 documents (a fifth uniform, the rest
    in the tail), and half of the RL on the tail. Compute is counted as there; prompts are half of a document here. 64
    held-out problems of each slice, 32 samples each; right is what is verified step by step.

    Rule, fixed before the run, over three seeds: with 1 % seen, RL on the tail raises pass@32 there by more than 10
    points; with none, it leaves it within 10 points. RL on the head raises pass@1 there, and leaves pass@32 within 5
    points. Mid-training and half of the RL give a higher pass@32 on the tail than RL alone.
    """
    reward = methods.process_grpo(strict=True)
    middle = in_lab(methods.sft(), steps=160, batch=32, epochs=None)
    assert isinstance(middle, Method)

    def rl(name: str, steps: int = 60) -> Stage:
        made = in_lab(reward, steps=steps, max_tokens=64)
        assert isinstance(made, Method)
        return Stage(made, partial(on_slice, name))

    return Study(
        claim="RL raises pass@32 in a context of which pre-training showed 1 %, not in one that it never showed; at "
        "equal compute, mid-training with less RL does better.",
        setting="lab models of word problems; 60 RL steps x 16 prompts x 8 rollouts, or 160 steps of mid-training on "
        "32 documents and 30 of RL, which cost about the same.",
        arms={
            "before": _worded(SEEN),
            "rl-tail": _worded(SEEN, rl("tail")),
            "rl-head": _worded(SEEN, rl("head")),
            "mid-rl": _worded(SEEN, Stage(middle, towards_tail), rl("tail", 30)),
            "before, unseen": _worded(UNSEEN),
            "rl-tail, unseen": _worded(UNSEEN, rl("tail")),
        },
        expectations=(
            Better("rl-tail", than="before", metric="pass@32/tail", margin=0.1, why="a new ability, on the edge"),
            Within("rl-tail, unseen", of="before, unseen", metric="pass@32/tail", tolerance=0.1, why="none beyond it"),
            Better("rl-head", than="before", metric="pass@1/head", why="what is there is amplified"),
            Within("rl-head", of="before", metric="pass@32/head", tolerance=0.05, why="and nothing new appears"),
            Better("mid-rl", than="rl-tail", metric="pass@32/tail", why="mid-training prepares the ground"),
        ),
        seeds=3,
    )
