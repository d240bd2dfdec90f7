"""Rollouts and rewards on a cluster: as without one, whoever draws and whoever dies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from ray_cluster import Mortal, MortalLetters, cluster, killing  # noqa: F401 - a fixture

from conftest import make_model, make_tokenizer
from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.recipe import parse_recipe
from posttrain.reward.pooled import PooledReward
from posttrain.reward.reward import reward_from
from posttrain.reward.scorers import Answer
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.pool.cluster import Cluster
from posttrain.rollout.pool.engine import PooledEngine, pieces_of
from posttrain.rollout.rollout import rollout
from posttrain.run import execute
from posttrain.training.collect import Online
from posttrain.training.loop import Trainer
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling
from tiny_training import letters, make_policy, prompts, same, weights

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]
SAMPLING = Sampling(max_tokens=8, top_k=50)
PIECE = 2


def talkative() -> CausalPolicy:
    """A tiny policy of whose tokens a third end a completion, so that most episodes have a second turn."""
    policy = make_policy()
    policy.model.generation_config.eos_token_id = list(range(2, 259, 3))
    return policy


class Pool:
    """A policy and two workers for it, which the tests share; every test starts from the same weights."""

    def __init__(self) -> None:
        self.policy = talkative()
        self.start = weights(self.policy)
        self.said: list[str] = []
        self.engine = PooledEngine(self.policy, Cluster(workers=2, piece=PIECE), say=self.said.append)

    @torch.no_grad()
    def reset(self) -> None:
        for name, parameter in self.policy.model.named_parameters():
            parameter.copy_(self.start[name])

    def in_pieces(self, starts: list[Prompt], environment: Any = None, seed: int = 3) -> list[Group]:
        """What the engine of this process draws, of the pieces that workers are given."""
        local = engine_for(self.policy)
        found: list[Any] = [None] * len(starts)
        for piece in pieces_of(starts, PIECE):
            groups = rollout(local, [starts[i] for i in piece], 3, SAMPLING, seed, environment)
            for i, group in zip(piece, groups, strict=True):
                found[i] = group
        return found


@pytest.fixture(scope="module")
def shared(cluster: None) -> Iterator[Pool]:  # noqa: F811
    made = Pool()
    yield made
    made.engine.close()


@pytest.fixture
def pool(shared: Pool) -> Pool:
    shared.reset()
    return shared


def assert_equal(found: list[Group], expected: list[Group]) -> None:
    """Bit for bit, log-probabilities too."""
    assert [len(g) for g in found] == [len(g) for g in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.prompt is other.prompt
        for a, b in zip(one.trajectories, other.trajectories, strict=True):
            assert (a.finish, a.text) == (b.finish, b.text)
            for name in ("tokens", "action_mask", "behaviour_logp", "behaviour_logp_full", "turn"):
                assert torch.equal(getattr(a, name), getattr(b, name)), name
            assert (a.token_reward is None) == (b.token_reward is None)


def test_completions_are_those_of_this_process(pool: Pool) -> None:
    starts = [*prompts(7), prompts(7)[2]]  # one key twice: its samples go on counting
    seen: list[tuple[int, int]] = []
    found = pool.engine.generate(starts, 3, SAMPLING, 3, lambda done, total: seen.append((done, total)))
    expected = pool.in_pieces(starts)
    plain = engine_for(pool.policy).generate(starts, 3, SAMPLING, 3)
    for row, group, whole in zip(found, expected, plain, strict=True):
        for completion, trajectory, other in zip(row, group.trajectories, whole, strict=True):
            assert torch.equal(completion.tokens, trajectory.tokens[trajectory.action_mask])
            assert torch.equal(completion.tokens, other.tokens), "however the prompts are shared out"
            assert trajectory.behaviour_logp is not None
            assert torch.equal(completion.logp, trajectory.behaviour_logp[trajectory.action_mask])
            assert torch.allclose(completion.logp, other.logp, atol=1e-5)
    assert not torch.equal(found[2][0].tokens, found[7][0].tokens)
    assert seen[-1] == (24, 24)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize("when", ["before", "during"])
def test_weights_are_those_of_the_moment_it_was_begun(pool: Pool, when: str) -> None:
    starts = prompts(6)
    if when == "before":
        underway = pool.engine.begin(starts, 3, SAMPLING, 3)
        expected = pool.in_pieces(starts)
    with torch.no_grad():
        for parameter in pool.policy.model.parameters():
            parameter.mul_(0.5)
    later = pool.engine.begin(starts, 3, SAMPLING, 3)
    if when == "before":
        assert_equal(underway.groups(), expected)
    assert_equal(later.groups(), pool.in_pieces(starts))


def test_whole_episodes_are_played_there_and_a_killed_worker_is_replaced(pool: Pool, tmp_path: Path) -> None:
    """SIGKILL in the middle of an episode's second turn."""
    starts, file = prompts(6), tmp_path / "pid"
    expected = pool.in_pieces(starts, Mortal("", 0))
    longer = [g.prompt.key for g in expected if g.prompt and any(int(t.turn.max()) for t in g.trajectories)]  # type: ignore[union-attr]
    assert len(longer) > 3
    assert_equal(rollout(pool.engine, starts, 3, SAMPLING, 3, Mortal("", 0)), expected)
    before = pool.engine.replaced
    with killing(file):
        found = rollout(pool.engine, starts, 3, SAMPLING, 3, Mortal(str(file), longer[0]))
    assert_equal(found, expected)
    assert pool.engine.replaced == before + 1
    assert pool.said[-1] == "a rollout worker died; another takes its place and does its work again"


def test_what_a_worker_refuses_is_one_line(pool: Pool) -> None:
    with pytest.raises(PosttrainError, match=r"prompt 5 has 300 tokens and the model's context is 256"):
        pool.engine.generate([Prompt(torch.arange(300) % 200, key=5)], 1, SAMPLING, 0)
    with pytest.raises(PosttrainError, match="samples is 0"):
        pool.engine.generate(prompts(1), 0, SAMPLING, 0)


def trained(policy: CausalPolicy, engine: Any, reward: Any = None, environment: Any = None, **settings: Any) -> Trainer:
    given = {"steps": 3, "batch": 4, "group": 3, "max_tokens": 8, "learning_rate": 1e-3, **settings}
    method = methods.grpo().with_settings(**given)
    starts = prompts(8)
    found = reward_from(letters) if reward is None else reward
    source = Online(starts, method.sampler(starts, 0), method.settings, engine, found, 0, environment)
    trainer = Trainer(policy, method, source)
    trainer.run()
    return trainer


@pytest.mark.parametrize("staleness", [0, 1])
def test_training_is_that_without_a_cluster_and_without_a_kill(pool: Pool, tmp_path: Path, staleness: int) -> None:
    """Of the same bits with and without a kill; to 1e-4 without Ray, where all prompts are decoded together."""
    world = Mortal("", 0)
    trained(pool.policy, pool.engine, environment=world, staleness=staleness)
    whole = weights(pool.policy)
    assert not same(whole, pool.start)
    local = talkative()
    plain = trained(local, engine_for(local), environment=world, staleness=staleness)
    for name, value in weights(local).items():
        assert torch.allclose(value, whole[name], atol=1e-4), name
    assert plain.progress.step == 3
    pool.reset()
    file = tmp_path / "pid"
    with killing(file):
        trained(pool.policy, pool.engine, environment=Mortal(str(file), 3, turn=0), staleness=staleness)
    assert same(weights(pool.policy), whole)


def test_rewards_on_workers(tmp_path: Path) -> None:
    """Scores and failures as in this process; one worker is killed at it."""
    starts = prompts(6)
    groups = engine_for(make_policy()).generate(starts, 4, SAMPLING, 1)
    file = tmp_path / "pid"
    common = {"length": {"maximum": 5, "weight": 0.5}, "fussy": fussy, "on_error": -1}
    local = reward_from({"mine": letters, **common})
    pooled = PooledReward(reward_from({"mine": MortalLetters(str(file)), **common}), 2)
    given = [
        Answer(start, c.text, len(c.tokens), c.finish) for start, row in zip(starts, groups, strict=True) for c in row
    ]
    with killing(file):
        found = pooled.score_all(given)
    assert found == local.score_all(given)
    assert pooled.errors == local.errors
    assert pooled.errors["fussy"] > 0
    pooled.close()


def fussy(completion: str, prompt: Prompt) -> float:
    if prompt.key == 4:
        raise ValueError("not this one")
    return 1.0


def test_a_recipe_with_a_cluster(tmp_path: Path) -> None:
    """A whole run: the model that it ends in is that of the same recipe without a cluster, workers and all."""
    make_model().save_pretrained(tmp_path / "model")
    make_tokenizer().save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"p{i}", "answer": "a"} for i in range(8)]
    grpo = {"steps": 2, "batch": 4, "group": 3, "max_tokens": 6, "learning_rate": 1e-3, "staleness": 1}
    chosen = {
        "model": {"id": str(tmp_path / "model"), "precision": "fp32"},
        "task": {"file": rows, "heldout": 2, "reward": "ray_cluster:vowels"},
        "stages": [{"grpo": grpo}],
        "evaluate": {"max_tokens": 6},
    }
    ends, logs = {}, {}
    for name, more in (("plain", {}), ("cluster", {"cluster": {"workers": 2, "reward_workers": 1, "piece": 2}})):
        run = execute(parse_recipe({**chosen, **more}), folder=tmp_path / name, show=False)
        ends[name] = weights(run.model)
        logs[name] = [json.loads(line) for line in (run.folder / "metrics.jsonl").read_text().splitlines()]
    for name, value in ends["plain"].items():
        assert torch.allclose(value, ends["cluster"][name], atol=1e-4), name
    for one, other in zip(logs["plain"], logs["cluster"], strict=True):
        for figure in one.keys() & {"reward", "length", "truncated", "heldout_accuracy", "staleness", "rollouts"}:
            assert one[figure] == pytest.approx(other[figure]), figure
    assert "cluster:" in (tmp_path / "cluster" / "recipe.yaml").read_text()
