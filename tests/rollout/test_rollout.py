"""Episodes: masks, turns, log-probabilities and rewards line up with the tokens as they were sampled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch

from posttrain.models.packing import pack
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.engine import Progress
from posttrain.rollout.environment import Reply, SingleTurn
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, Finish, Prompt, Sampling, Trajectory
from tiny_models import make_policy, random_tokens

END, EQUALS = 2, 9
SAMPLING = Sampling(max_tokens=8, temperature=0.9, top_p=0.95)


@dataclass
class Calculator:
    """Answers the first turn with the sum of its tokens, behind an `=`; rewards both turns; two turns."""

    max_turns: int = 2
    over_when_odd: bool = False

    def answer(self, completion: Completion) -> list[int]:
        return [EQUALS, int(completion.tokens.sum()) % 50 + 10, EQUALS]

    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply:
        assert len(completions) == turn + 1
        done = self.over_when_odd and int(completions[-1].tokens.sum()) % 2 == 1
        return Reply(torch.tensor(self.answer(completions[-1])), reward=turn + 0.5, done=done)


class Scripted:
    """An engine that says what it is told, and remembers what it was asked."""

    def __init__(self, *turns: list[list[int]], finish: Finish = "stop", max_length: int = 100) -> None:
        self.turns, self.finish, self.max_length = list(turns), finish, max_length
        self.asked: list[list[list[int]]] = []
        self.seeds: list[int] = []

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Progress | None = None
    ) -> list[list[Completion]]:
        self.asked.append([p.tokens.tolist() for p in prompts])
        self.seeds.append(seed)
        said = iter(self.turns[len(self.asked) - 1])
        rows = []
        for _ in prompts:
            row = []
            for _ in range(samples):
                tokens = torch.tensor(next(said))
                row.append(Completion(tokens, -tokens / 10, -tokens / 5, self.finish, f"<{len(tokens)}>"))
            rows.append(row)
        return rows


def rewards(trajectory: Trajectory) -> list[float]:
    assert trajectory.token_reward is not None
    return trajectory.token_reward.tolist()


def turns(trajectory: Trajectory) -> list[int]:
    assert trajectory.turn is not None
    return trajectory.turn.tolist()


def logps(trajectory: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    assert trajectory.behaviour_logp is not None
    assert trajectory.behaviour_logp_full is not None
    return trajectory.behaviour_logp, trajectory.behaviour_logp_full


def make_prompts() -> list[Prompt]:
    draw = torch.Generator().manual_seed(2)
    return [Prompt(random_tokens(n, draw), key=n) for n in (5, 1, 4)]


def test_one_turn_by_hand():
    prompt = Prompt(torch.tensor([4, 5]), answer="x", key=3)
    (group,) = rollout(Scripted([[7, END], [8]]), [prompt], 2, SAMPLING, seed=0)
    assert group.prompt is prompt
    first, second = group.trajectories
    assert first.tokens.tolist() == [4, 5, 7, END]
    assert first.action_mask.tolist() == [False, False, True, True]
    torch.testing.assert_close(logps(first)[0], torch.tensor([0, 0, -0.7, -0.2]))
    torch.testing.assert_close(logps(first)[1], torch.tensor([0, 0, -1.4, -0.4]))
    assert turns(first) == [0, 0, 0, 0]
    assert first.token_reward is None
    assert first.reward != first.reward  # not scored yet
    assert (first.finish, first.text, first.source) == ("stop", "<2>", "policy")
    assert second.tokens.tolist() == [4, 5, 8]


def test_two_turns_by_hand():
    engine = Scripted([[20, END], [21]], [[30, END], [31, 32, END]])
    prompt = Prompt(torch.tensor([4, 5]), key=3)
    (group,) = rollout(engine, [prompt], 2, SAMPLING, seed=0, environment=Calculator())
    assert engine.asked == [[[4, 5]], [[4, 5, 20, END, EQUALS, 32, EQUALS], [4, 5, 21, EQUALS, 31, EQUALS]]]
    first, second = group.trajectories
    assert first.tokens.tolist() == [4, 5, 20, END, EQUALS, 32, EQUALS, 30, END]
    assert first.action_mask.tolist() == [False] * 2 + [True] * 2 + [False] * 3 + [True] * 2
    assert turns(first) == [0] * 7 + [1] * 2
    torch.testing.assert_close(logps(first)[0], torch.tensor([0, 0, -2.0, -0.2, 0, 0, 0, -3.0, -0.2]))
    torch.testing.assert_close(logps(first)[1], 2 * logps(first)[0])
    assert rewards(first) == [0, 0, 0, 0.5, 0, 0, 0, 0, 1.5]
    assert first.text == "<2><2>"
    assert second.tokens.tolist() == [4, 5, 21, EQUALS, 31, EQUALS, 31, 32, END]  # the world is silent at the end
    assert rewards(second) == [0, 0, 0.5, 0, 0, 0, 0, 0, 1.5]
    assert prompt.tokens.tolist() == [4, 5]


@pytest.mark.parametrize("engine_class", [EmbeddedEngine, PlainEngine])
def test_sampled_turns_line_up_with_training(engine_class, tiny_tokenizer):
    """What an engine says of its tokens over two turns is what one forward pass of training says of the whole row."""
    policy = make_policy("gemma2", tiny_tokenizer)
    policy.model.generation_config.eos_token_id = list(range(2, 20))
    engine, world = engine_class(policy, rows=4), Calculator(over_when_odd=True)
    prompts = make_prompts()
    first = engine.generate(prompts, 6, SAMPLING, seed=0)
    groups = rollout(engine, prompts, 6, SAMPLING, seed=0, environment=world)
    kinds = set()
    for prompt, group, row in zip(prompts, groups, first, strict=True):
        for trajectory, completion in zip(group.trajectories, row, strict=True):
            said = [*prompt.tokens.tolist(), *completion.tokens.tolist()]
            over = completion.finish == "length" or int(completion.tokens.sum()) % 2 == 1
            kinds.add((over, completion.finish))
            tokens = trajectory.tokens.tolist()
            assert tokens[: len(said)] == said  # as sampled, never re-tokenised
            if over:
                assert len(tokens) == len(said)
                assert trajectory.actions == len(completion.tokens)
                continue
            assert tokens[len(said) : len(said) + 3] == world.answer(completion)
            places = range(len(tokens))
            expected = [len(prompt.tokens) <= i < len(said) or i >= len(said) + 3 for i in places]
            assert trajectory.action_mask.tolist() == expected
            assert turns(trajectory) == [int(i >= len(said) + 3) for i in places]
            earned = {i: r for i, r in enumerate(rewards(trajectory)) if r}
            assert earned == {len(said) - 1: 0.5, len(tokens) - 1: 1.5}
    assert len(kinds) == 3
    batch = Batch.of(groups)
    assert int(batch.turn.max()) == 1
    with torch.no_grad():
        logp = policy.log_likelihood(batch, temperature=SAMPLING.temperature).logp
    torch.testing.assert_close(batch.behaviour_logp_full, logp, atol=2e-5, rtol=1e-5)
    assert bool((batch.behaviour_logp >= batch.behaviour_logp_full - 1e-5).all())
    assert len(pack(batch).tokens) < sum(len(t.tokens) for g in groups for t in g.trajectories)


def test_reproducible_and_independent_of_other_prompts(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    prompts = make_prompts()

    def play(which, seed=0, samples=3):
        groups = rollout(EmbeddedEngine(policy, rows=3), which, samples, SAMPLING, seed, environment=Calculator())
        return [[t.tokens.tolist() for t in g.trajectories] for g in groups]

    assert play(prompts) == play(prompts)
    assert play(prompts[::-1]) == play(prompts)[::-1]
    assert play(prompts[1:]) == play(prompts)[1:]
    assert play(prompts, seed=1) != play(prompts)


def test_later_turns_have_seeds_of_their_own():
    """Not those that a neighbouring rollout uses: steps of training count their seeds up."""
    seeds = []
    for seed in range(20):
        engine = Scripted(*[[[20, END]]] * 4)
        rollout(engine, [Prompt(torch.tensor([4]))], 1, SAMPLING, seed=seed, environment=Calculator(max_turns=4))
        assert engine.seeds[0] == seed
        seeds += engine.seeds
    assert len(set(seeds)) == len(seeds) == 80


def test_an_episode_ends_when_all_are_done():
    engine = Scripted([[21], [23]])
    rollout(engine, [Prompt(torch.tensor([4]))], 2, SAMPLING, 0, environment=Calculator(over_when_odd=True))
    assert len(engine.asked) == 1


def test_only_open_episodes_go_on():
    engine = Scripted([[21], [22]], [[24]])
    (group,) = rollout(engine, [Prompt(torch.tensor([4]))], 2, SAMPLING, 0, environment=Calculator(over_when_odd=True))
    assert [t.tokens.tolist() for t in group.trajectories] == [[4, 21], [4, 22, EQUALS, 32, EQUALS, 24]]
    assert [rewards(t) for t in group.trajectories] == [[0, 0.5], [0, 0.5, 0, 0, 0, 1.5]]


def test_a_turn_that_is_cut_off_ends_the_episode():
    engine = Scripted([[20]], finish="length")
    ((trajectory,),) = (
        g.trajectories for g in rollout(engine, [Prompt(torch.tensor([4]))], 1, SAMPLING, 0, environment=Calculator())
    )
    assert trajectory.tokens.tolist() == [4, 20]
    assert trajectory.finish == "length"
    assert rewards(trajectory) == [0, 0.5]


@pytest.mark.parametrize(("context", "played"), [(8, 2), (7, 2), (6, 1), (3, 1)])
def test_no_room_for_another_turn_ends_the_episode(context, played):
    """6 tokens after the world's answer; the next turn needs one more."""
    engine = Scripted([[20, END]], [[30]], max_length=context)
    ((trajectory,),) = (
        g.trajectories for g in rollout(engine, [Prompt(torch.tensor([4]))], 1, SAMPLING, 0, environment=Calculator())
    )
    assert len(engine.asked) == played
    assert trajectory.finish == ("stop" if played == 2 else "length")
    assert trajectory.tokens.tolist() == [4, 20, END, *([EQUALS, 32, EQUALS, 30] if played == 2 else [])]


def test_the_real_context_is_never_exceeded(tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer, max_position_embeddings=24)
    policy.model.generation_config.eos_token_id = list(range(2, 12))
    sampling = Sampling(max_tokens=6, temperature=1.5)
    world = Calculator(max_turns=8)
    groups = rollout(EmbeddedEngine(policy), make_prompts(), 4, sampling, seed=0, environment=world)
    members = [t for g in groups for t in g.trajectories]
    assert max(t.length for t in members) <= 24
    assert any(t.finish == "length" and t.length > 18 for t in members)
    assert bool(torch.isfinite(policy.log_likelihood(Batch.of(groups)).logp).all())


def test_progress_is_that_of_the_first_turn(tiny_tokenizer):
    seen: list[tuple[int, int]] = []
    policy = make_policy("llama", tiny_tokenizer)
    rollout(
        EmbeddedEngine(policy),
        make_prompts(),
        2,
        SAMPLING,
        0,
        Calculator(),
        lambda done, total: seen.append((done, total)),
    )
    assert seen[-1] == (6, 6)


def test_the_default_environment_is_over_at_once():
    reply = SingleTurn().respond(Prompt(torch.tensor([1])), [], 0)
    assert reply.done
    assert len(reply.tokens) == 0
    assert SingleTurn().max_turns == 1
