"""The embedded engine says which experts it sent each token to: those that a trainer's forward pass would choose."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.models.routing import record_experts
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.engine import keep_experts
from posttrain.rollout.environment import Reply
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling
from tiny_models import make_policy

LAYERS, ACTIVE = 2, 2


def prompts(*lengths: int) -> list[Prompt]:
    draw = torch.Generator().manual_seed(0)
    return [Prompt(torch.randint(3, 64, (n,), generator=draw), key=i) for i, n in enumerate(lengths)]


@pytest.mark.parametrize("name", ["mixtral", "qwen3-moe"])
def test_recorded_experts_are_those_of_a_forward_pass(name: str, tiny_tokenizer: Any) -> None:
    policy = make_policy(name, tiny_tokenizer)
    engine = EmbeddedEngine(policy, rows=3, experts=True)  # fewer rows than completions: some start later
    groups = rollout(engine, prompts(4, 7, 5), 3, Sampling(max_tokens=9), seed=1)
    lengths = set()
    for trajectory in (t for g in groups for t in g.trajectories):
        assert trajectory.experts is not None
        assert trajectory.experts.shape == (trajectory.length - 1, LAYERS, ACTIVE)
        lengths.add(trajectory.length)
        with torch.no_grad(), record_experts(policy.model) as recorder:
            policy.model(trajectory.tokens[None, :-1])
        own = recorder.take()
        assert torch.equal(own.sort(-1).values, trajectory.experts.sort(-1).values)
    assert len(lengths) > 1
    batch = Batch.of(groups)
    assert batch.experts is not None
    with torch.no_grad():
        replayed = policy.log_likelihood(batch).logp
    torch.testing.assert_close(replayed, batch.behaviour_logp_full, rtol=1e-4, atol=1e-4)


def test_unless_asked_for_nothing_is_recorded(tiny_tokenizer: Any) -> None:
    policy = make_policy("mixtral", tiny_tokenizer)
    groups = rollout(EmbeddedEngine(policy), prompts(4), 2, Sampling(max_tokens=3), seed=1)
    assert all(t.experts is None for t in groups[0].trajectories)
    assert Batch.of(groups).experts is None


class Echo:
    """Two turns; the world says two tokens between them."""

    max_turns = 2

    def respond(self, prompt: Prompt, completions: list[Completion], turn: int) -> Reply:
        return Reply(torch.tensor([7, 9]), done=turn == 1)


def test_several_turns(tiny_tokenizer: Any) -> None:
    policy = make_policy("mixtral", tiny_tokenizer)
    policy.model.generation_config.eos_token_id = list(range(0, 64, 2))  # half of all tokens end a turn
    engine = EmbeddedEngine(policy, experts=True)
    groups = rollout(engine, prompts(4, 6), 4, Sampling(max_tokens=8), seed=3, environment=Echo())
    twice = [t for g in groups for t in g.trajectories if t.turn is not None and int(t.turn.max()) == 1]
    assert twice
    for trajectory in twice:
        assert trajectory.experts is not None
        assert trajectory.experts.shape == (trajectory.length - 1, LAYERS, ACTIVE)
        with torch.no_grad(), record_experts(policy.model) as recorder:
            policy.model(trajectory.tokens[None, :-1])
        assert torch.equal(recorder.take().sort(-1).values, trajectory.experts.sort(-1).values)


def test_engines_that_cannot_record_are_refused(tiny_tokenizer: Any) -> None:
    policy = make_policy("mixtral", tiny_tokenizer)
    engine = EmbeddedEngine(policy)
    keep_experts(engine, "minirl")
    assert engine.experts
    with pytest.raises(PosttrainError, match="minirl replays the sampler's experts, which PlainEngine"):
        keep_experts(PlainEngine(policy), "minirl")
