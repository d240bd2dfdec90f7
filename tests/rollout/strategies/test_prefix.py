"""Continuing demonstrations: what is given, what is drawn behind it, and who wrote which token."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from posttrain.objective.batch import Batch
from posttrain.objective.schedule import Cosine
from posttrain.rollout.strategies.prefix import DemonstrationPrefix, worked_tokens
from posttrain.trajectory import SOURCES, Group, PosttrainError, Prompt, Sampling, Trajectory
from tiny_tasks import END, TOKENIZER, step_context, tiny_policy, tiny_prompts

EXPERT = SOURCES.index("expert")


def played(strategy: DemonstrationPrefix, prompts: list[Prompt] | None = None, **fields: Any) -> list[Group]:
    return strategy(tiny_prompts() if prompts is None else prompts, step_context(tiny_policy(), **fields))


def given(trajectory: Trajectory) -> int:
    """How many tokens the demonstration wrote."""
    return 0 if trajectory.token_source is None else int((trajectory.token_source == EXPERT).sum())


@pytest.mark.parametrize(("share", "tokens"), [(0.0, 0), (0.19, 1), (0.5, 5), (0.95, 9), (1.0, 10)])
def test_the_last_of_a_group_starts_with_a_piece_of_the_demonstration(share: float, tokens: int) -> None:
    for group in played(DemonstrationPrefix(share, share)):
        assert group.prompt is not None
        assert group.prompt.demonstration is not None
        *plain, hybrid = group.trajectories
        start = len(group.prompt.tokens)
        assert len(plain) == 3
        assert [given(t) for t in plain] == [0, 0, 0]
        assert given(hybrid) == tokens
        assert torch.equal(
            hybrid.tokens[: start + tokens], group.prompt.demonstration.tokens[: start + tokens]
        )  # the demonstration's tokens, not its text tokenised again
        assert END not in hybrid.tokens[: start + tokens].tolist()
        assert hybrid.token_source is not None
        assert bool((hybrid.token_source[start : start + tokens] == EXPERT).all())
        assert hybrid.prompt_length == start  # the prefix is trained on
        assert hybrid.actions == len(hybrid.tokens) - start


def test_the_whole_text_is_scored() -> None:
    seen: list[str] = []

    def reward(completion: str, prompt: Prompt) -> float:
        seen.append(completion)
        return float(len(seen))

    groups = played(DemonstrationPrefix(0.5, 0.5), reward=reward)
    texts = [t.text for g in groups for t in g.trajectories]
    assert seen == texts
    assert all(g.trajectories[-1].text.startswith("abcde") for g in groups)
    assert [t.reward for g in groups for t in g.trajectories] == list(range(1, 13))


def test_log_probabilities_are_known_where_the_policy_chose() -> None:
    policy = tiny_policy()
    groups = DemonstrationPrefix(0.5, 0.5)(tiny_prompts(), step_context(policy))
    batch = Batch.of(groups)
    assert batch.token_source is not None
    theirs = batch.token_source == EXPERT
    assert torch.equal(batch.behaviour_logp_full.isnan(), theirs)
    with torch.no_grad():
        logp = policy.log_likelihood(batch).logp
    torch.testing.assert_close(batch.behaviour_logp_full[~theirs], logp[~theirs], rtol=1e-4, atol=1e-4)


def test_prefix_and_continuation_share_the_limit() -> None:
    short = tiny_prompts(2)
    demonstration = short[1].demonstration
    assert demonstration is not None
    short[1].demonstration = replace(  # 3 tokens and the end
        demonstration,
        tokens=demonstration.tokens[[*range(7), -1]],
        action_mask=demonstration.action_mask[[*range(7), -1]],
    )
    # together, where the call's limit is that of the shorter prefix, and each alone
    together = played(DemonstrationPrefix(1.0, 1.0, room=2), short, sampling=Sampling(max_tokens=11))
    for prompt, group in zip(short, together, strict=True):
        hybrid = group.trajectories[-1]
        assert hybrid.actions <= 11
        (alone,) = played(DemonstrationPrefix(1.0, 1.0, room=2), [prompt], sampling=Sampling(max_tokens=11))
        assert torch.equal(alone.trajectories[-1].tokens, hybrid.tokens)
        assert alone.trajectories[-1].finish == hybrid.finish
        assert alone.trajectories[-1].text == hybrid.text
    assert [given(g.trajectories[-1]) for g in together] == [9, 3]  # 11 tokens, of which 2 stay free


def test_the_share_follows_its_schedule() -> None:
    def tokens(step: int) -> list[int]:
        groups = played(DemonstrationPrefix(Cosine(0.95, 0.05), 0.95), tiny_prompts(40), step=step, total=100)
        return [given(g.trajectories[-1]) for g in groups]

    assert set(tokens(0)) == {9}
    late = tokens(100)
    assert min(late) <= 1
    assert max(late) == 9
    middle = tokens(50)  # low(s) = 0.5
    assert min(middle) >= 5
    assert len(set(middle)) > 2


def test_a_repeated_step_is_the_same() -> None:
    first, second = (played(DemonstrationPrefix()) for _ in range(2))
    assert all(
        torch.equal(a.tokens, b.tokens)
        for g, h in zip(first, second, strict=True)
        for a, b in zip(g.trajectories, h.trajectories, strict=True)
    )


def test_reports_rewards_with_and_without() -> None:
    context = step_context(tiny_policy(), reward=lambda text, prompt: float(text.startswith("abcdefghi")))
    DemonstrationPrefix(0.95, 0.95)(tiny_prompts(), context)
    assert context.metrics == {"prefix_tokens": 9.0, "reward_with_prefix": 1.0, "reward_without_prefix": 0.0}


def test_an_end_token_is_no_part_of_a_demonstration() -> None:
    (prompt,) = tiny_prompts(1)
    assert TOKENIZER.decode(worked_tokens(prompt, {END}).tolist()) == "abcdefghi0"


def test_refuses_what_it_cannot_continue() -> None:
    (prompt,) = tiny_prompts(1)
    with pytest.raises(PosttrainError, match="has none"):
        played(DemonstrationPrefix(), [replace(prompt, demonstration=None)])
    with pytest.raises(PosttrainError, match="room is 13"):
        played(DemonstrationPrefix(room=13))
    assert prompt.demonstration is not None
    mask = prompt.demonstration.action_mask.clone()
    mask[6] = False
    turns = replace(prompt, demonstration=replace(prompt.demonstration, action_mask=mask))
    with pytest.raises(PosttrainError, match="several turns"):
        played(DemonstrationPrefix(), [turns])

    class Turns:
        max_turns = 3

        def respond(self, prompt: Prompt, completions: Any, turn: int) -> Any: ...

    with pytest.raises(PosttrainError, match="up to 3"):
        played(DemonstrationPrefix(), environment=Turns())
