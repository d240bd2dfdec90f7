"""Feedback in the rollout: what a teacher is shown, how attempt and feedback are joined, whose tokens are whose."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.feedback import FEEDBACK, Attempt, Feedback, Prompted
from posttrain.rollout.strategy import Plain
from posttrain.trajectory import SOURCES, Group, PosttrainError, Prompt, Sampling, Trajectory
from tiny_tasks import END, TOKENIZER, Scripted, letters, step_context, tiny_policy, tiny_prompts

TEACHER = SOURCES.index("teacher")


def ids(text: str) -> Tensor:
    return torch.tensor(TOKENIZER.encode(text, add_special_tokens=False), dtype=torch.int64)


@dataclass
class Scribe:
    """Writes one text behind every attempt, and remembers what it was shown."""

    text: str = " no"
    end: bool = True
    shown: list[Attempt] = field(default_factory=list)

    def __call__(self, attempts: Sequence[Attempt], context: StepContext) -> list[Tensor]:
        self.shown += attempts
        return [torch.cat([ids(self.text), torch.tensor([END] * self.end, dtype=torch.int64)]) for _ in attempts]


def taught(trajectory: Trajectory) -> Tensor:
    """The tokens that the teacher wrote."""
    if trajectory.token_source is None:
        return torch.empty(0, dtype=torch.int64)
    return trajectory.tokens[trajectory.token_source == TEACHER]


def scripted(author: Scribe, text: str = "ab", share: float = 0.5, **fields: object) -> tuple[Group, StepContext]:
    """A group of one-letter completions."""
    (prompt,) = tiny_prompts(1)
    engine = Scripted({prompt.key: text})
    context = step_context(tiny_policy(), engine=engine, group=len(text), **fields)
    (group,) = Feedback(share, author)([prompt], context)
    return group, context


def test_a_share_of_a_group_goes_on() -> None:
    scribe = Scribe()
    group, _ = scripted(scribe, "abcde", share=0.5)
    joined = [t for t in group.trajectories if len(taught(t))]
    assert len(group) == 5
    assert len(joined) == 3  # half of five, rounded up
    for t in joined:
        # the attempt without its end token, then the teacher's tokens and nothing else
        assert torch.equal(taught(t), torch.cat([ids(" no"), torch.tensor([END])]))
        assert t.tokens.tolist().count(END) == 1
        assert t.text[1:] == " no"
        assert t.finish == "stop"
        assert t.actions == len(t.tokens) - t.prompt_length == 5
    assert {a.text for a in scribe.shown} == {t.text[0] for t in joined}


def test_who_is_chosen_depends_on_the_step_alone() -> None:
    def chosen(step_seed: int) -> list[int]:
        group, _ = scripted(Scribe(), "abcdefgh", 0.25, seed=step_seed)
        return [i for i, t in enumerate(group.trajectories) if len(taught(t))]

    assert chosen(5) == chosen(5)
    assert len({tuple(chosen(seed)) for seed in range(8)}) > 1


@pytest.mark.limit("thinktuning")
def test_without_a_share_it_is_the_plain_strategy() -> None:
    plain, ours = (s(tiny_prompts(), step_context(tiny_policy())) for s in (Plain(), Feedback(0.0)))
    for g, h in zip(plain, ours, strict=True):
        assert [t.reward for t in g.trajectories] == [t.reward for t in h.trajectories]
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(g.trajectories, h.trajectories, strict=True))
    assert Feedback(0.0, Prompted(reference=True)).reference is False


def test_the_joined_text_is_what_is_scored() -> None:
    group, context = scripted(Scribe(" no"), "a1", share=1.0)
    assert [t.reward for t in group.trajectories] == [letters(t.text, tiny_prompts(1)[0]) for t in group.trajectories]
    assert [t.text for t in group.trajectories] == ["a no", "1 no"]
    assert [t.rewards["letters"] for t in group.trajectories] == [t.reward for t in group.trajectories]
    assert "rescue_rate" in context.metrics


def test_rescue_and_harm_are_counted() -> None:
    def last(completion: str, prompt: Prompt) -> float:
        return float(completion[-1] == "+")

    (prompt,) = tiny_prompts(1)
    engine = Scripted({prompt.key: "+-+--"})
    context = step_context(tiny_policy(), last, engine=engine, group=5)
    Feedback(1.0, Scribe("+"))([prompt], context)
    assert (context.metrics["rescue_rate"], context.metrics["harm_rate"]) == (1.0, 0.0)
    context = step_context(tiny_policy(), last, engine=Scripted({prompt.key: "++-"}), group=3)
    Feedback(1.0, Scribe("-"))([prompt], context)
    assert (context.metrics["rescue_rate"], context.metrics["harm_rate"]) == (0.0, 1.0)


def test_the_teacher_is_told_whether_an_attempt_is_right() -> None:
    scribe = Scribe()
    scripted(scribe, "ab", 1.0, reward=lambda text, prompt: float(text.startswith("a")))
    assert {(a.text, a.right) for a in scribe.shown} == {("a", True), ("b", False)}


@pytest.mark.parametrize(
    ("text", "kept"),
    [("One. Two and", "One."), ("One. Two.", "One. Two."), ("a\nb", "a\n"), ("nothing ends", "nothing ends"),
     ("3.5 is", "3.5 is"), ("Ah? No", "Ah?")],
)  # fmt: skip
def test_a_cut_attempt_loses_its_unfinished_sentence(text: str, kept: str) -> None:
    (prompt,) = tiny_prompts(1)
    tokens = torch.cat([prompt.tokens, ids(text)])
    cut = Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt.tokens), finish="length", text=text)
    attempt = Feedback()._attempt(Group([cut], prompt), cut, tiny_policy())
    assert attempt.text == kept
    assert torch.equal(attempt.tokens, torch.cat([prompt.tokens, ids(kept)]))


def test_feedback_ends_with_the_models_context() -> None:
    policy = tiny_policy(max_position_embeddings=16)
    (prompt,) = tiny_prompts(1)
    context = step_context(policy, group=2, engine=Scripted({prompt.key: "ab"}))
    (group,) = Feedback(1.0, Scribe("x" * 20))([prompt], context)
    for t in group.trajectories:
        assert len(t.tokens) == 16
        assert t.finish == "length"


def test_an_unfinished_feedback_is_cut_off() -> None:
    group, _ = scripted(Scribe(end=False), "a", 1.0)
    assert group.trajectories[0].finish == "length"


def test_a_template_is_filled_in_once() -> None:
    (prompt,) = tiny_prompts(1)
    attempt = Attempt(prompt, "{answer} {verdict}", False, prompt.tokens)
    asked = Prompted("Q {question} A {attempt} V {verdict} G {answer} {other}").asked(attempt)
    assert asked == "Q p0: A {answer} {verdict} V wrong G 0 {other}"
    assert "{answer}" not in FEEDBACK
    with pytest.raises(PosttrainError, match=r"no \{attempt\}"):
        Prompted("judge {question}")


def test_a_prompted_teacher_writes_from_its_own_prompt() -> None:
    policy, teacher = tiny_policy(0), tiny_policy(7)
    author = Prompted("{question} {attempt}?", joint="|", max_tokens=6)
    context = step_context(policy, teacher=teacher)
    groups = Feedback(0.25, author)(tiny_prompts(), context)
    for group in groups:
        (joined,) = [t for t in group.trajectories if len(taught(t))]
        assert taught(joined)[0] == ids("|")
        assert 1 < len(taught(joined)) <= 7
        assert joined.behaviour_logp_full is not None
        assert joined.token_source is not None
        theirs = joined.token_source == TEACHER
        assert torch.equal(joined.behaviour_logp_full.isnan(), theirs)
    batch = Batch.of(groups)
    assert batch.token_source is not None
    mine = batch.token_source == SOURCES.index("policy")
    with torch.no_grad():
        logp = policy.log_likelihood(batch).logp
    torch.testing.assert_close(batch.behaviour_logp_full[mine], logp[mine], rtol=1e-4, atol=1e-4)
    # what the teacher wrote is what the teacher says behind that prompt, not what the policy would
    assert len({tuple(taught(t).tolist()) for g in groups for t in g.trajectories if len(taught(t))}) > 1


def test_the_first_policy_may_be_the_teacher() -> None:
    opened: list[str] = []
    first = tiny_policy(3)

    @contextmanager
    def reference() -> Iterator[CausalPolicy]:
        opened.append("open")
        yield first

    strategy = Feedback(0.25, Prompted("{attempt}", max_tokens=3, reference=True))
    assert strategy.reference
    groups = strategy(tiny_prompts(), step_context(tiny_policy(), reference=reference))
    assert opened == ["open"]
    assert sum(len(taught(t)) > 0 for g in groups for t in g.trajectories) == 3


def test_refusals() -> None:
    with pytest.raises(PosttrainError, match=r"share is 1\.5"):
        Feedback(1.5)
    with pytest.raises(PosttrainError, match="feedback needs a teacher"):
        Feedback()(tiny_prompts(), step_context(tiny_policy(), sampling=Sampling(max_tokens=4)))
