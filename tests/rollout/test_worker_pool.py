"""What a pool of rollout workers is made of, without a cluster; on one it is tried in tests/cluster."""

from __future__ import annotations

import pickle
import sys
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.models.adapters import add_lora
from posttrain.reward.pooled import PooledReward, RewardWorker
from posttrain.reward.reward import Reward, reward_from
from posttrain.reward.scorers import Answer
from posttrain.rollout.engine_choice import engine_for
from posttrain.rollout.pool.actor import RolloutWorker, pack, unpack
from posttrain.rollout.pool.cluster import Cluster, joined
from posttrain.rollout.pool.engine import PooledEngine, Underway, pieces_of
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import PosttrainError, Prompt, Sampling
from tiny_training import make_policy, prompts, same, weights

SAMPLING = Sampling(max_tokens=6)


def keyed(*keys: int) -> list[Prompt]:
    return [Prompt(torch.tensor([5]), key=key) for key in keys]


def test_pieces_hold_all_prompts_once_and_a_key_whole() -> None:
    assert pieces_of(keyed(1, 2, 3, 4, 5), 2) == [[0, 1], [2, 3], [4]]
    assert pieces_of(keyed(1, 2, 1, 3, 2, 1), 2) == [[0, 2, 5], [1, 4], [3]]
    assert pieces_of(keyed(1, 1, 1), 1) == [[0, 1, 2]]
    assert pieces_of([], 2) == []


def test_weights_arrive_bit_for_bit() -> None:
    one, other = make_policy(0), make_policy(1)
    unpack(other, pack(one))
    assert same(weights(one), weights(other))
    one, other = make_policy(0, torch.bfloat16), make_policy(1, torch.bfloat16)
    one.model.model.embed_tokens.requires_grad_(False)
    before = other.model.model.embed_tokens.weight.clone()
    unpack(other, pack(one))
    assert torch.equal(other.model.model.embed_tokens.weight, before), "what is not trained is not sent"
    assert torch.equal(other.model.model.norm.weight, one.model.model.norm.weight)
    assert torch.equal(other.model.model.layers[0].mlp.up_proj.weight, one.model.model.layers[0].mlp.up_proj.weight)


def test_a_worker_draws_with_the_weights_of_the_call() -> None:
    """Newer ones, and older ones after them: work of a worker that died may be of an earlier step."""
    threads = torch.get_num_threads()
    first, second = make_policy(0), make_policy(1)
    packed = [pack(first), pack(second)]
    worker = RolloutWorker(make_policy(2), engine_for, 64, False, 1)
    torch.set_num_threads(threads)
    for version in (0, 1, 0):
        policy = (first, second)[version]
        found = worker.play(version, packed[version], prompts(3), 2, SAMPLING, 7, None)
        expected = rollout(engine_for(policy), prompts(3), 2, SAMPLING, 7)
        for row, group in zip(found, expected, strict=True):
            for a, b in zip(row, group.trajectories, strict=True):
                assert torch.equal(a.tokens, b.tokens)
        completions = worker.generate(version, packed[version], prompts(3), 2, SAMPLING, 7)
        assert [[c.text for c in row] for row in completions] == [[t.text for t in row] for row in found]


def test_of_an_adapted_policy_the_adapter_is_sent() -> None:
    """The policy reaches the worker as a whole, once; then what is trained."""
    policy = add_lora(make_policy(), rank=2, seed=0)
    threads = torch.get_num_threads()
    worker = RolloutWorker(pickle.loads(pickle.dumps(policy)), engine_for, 64, False, 1)
    torch.set_num_threads(threads)
    with torch.no_grad():
        for _, parameter in policy.trainable_parameters():
            parameter.add_(torch.randn_like(parameter))
    assert pack(policy).nbytes < pack(make_policy()).nbytes / 2
    found = worker.play(1, pack(policy), prompts(3), 2, SAMPLING, 7, None)
    expected = rollout(engine_for(policy), prompts(3), 2, SAMPLING, 7)
    plain = rollout(engine_for(make_policy()), prompts(3), 2, SAMPLING, 7)
    assert [[t.text for t in row] for row in found] == [[t.text for t in g.trajectories] for g in expected]
    assert [[t.text for t in row] for row in found] != [[t.text for t in g.trajectories] for g in plain]


def test_a_worker_that_cannot_record_experts_says_so() -> None:
    class Nothing:
        pass

    with pytest.raises(PosttrainError, match=r"the pool of rollout workers replays .* Nothing does not record"):
        RolloutWorker(make_policy(), lambda policy, rows: Nothing(), 64, True, torch.get_num_threads())  # type: ignore[arg-type,return-value]


def test_rewards_of_workers_do_not_depend_on_the_worker() -> None:
    """Nor on what it scored before: random numbers follow from the call."""
    threads = torch.get_num_threads()
    spec = {f"{Path(__file__).parents[1] / 'reward' / 'faulty_rewards.py'}:obey": 1.0}
    one, other = RewardWorker(reward_from(spec)), RewardWorker(reward_from(spec))
    torch.set_num_threads(threads)
    prompt = Prompt(torch.tensor([5]), answer="1", key=3)
    given = [Answer(prompt, text, 1, "stop") for text in ("random", "random b", "raise x", "four")]
    state = torch.get_rng_state()
    ((first, second, fault, length),) = one.outcomes(given)
    assert first != second
    assert length == 4
    assert fault == one.reward.outcomes([given[2]])[0][0]
    assert [other.outcomes([answer])[0][0] for answer in reversed(given)] == [length, fault, second, first]
    torch.set_rng_state(state)


class Inline:
    """Workers that do a job when they are told to."""

    def __init__(self, reward: Reward) -> None:
        self.worker, self.jobs = RewardWorker(reward), list[tuple[Any, Future[Any]]]()

    def submit(self, call: Any) -> Future[Any]:
        self.jobs.append((call, Future()))
        return self.jobs[-1][1]

    def work(self) -> None:
        while self.jobs:
            call, future = self.jobs.pop(0)
            remote = SimpleNamespace(outcomes=SimpleNamespace(remote=self.worker.outcomes))
            future.set_result(call(remote))


def test_what_is_drawn_ahead_is_judged_ahead() -> None:
    """Once, in order, and counted when it is scored."""
    threads = torch.get_num_threads()
    own = reward_from({"length": {"maximum": 3}, "fails": lambda completion, prompt: 1 / 0, "on_error": -1})
    pooled = PooledReward(own, 1)
    inline = Inline(own)
    torch.set_num_threads(threads)
    pooled._workers = inline  # type: ignore[assignment]
    groups = rollout(engine_for(make_policy()), prompts(8), 3, SAMPLING, 1)
    futures: list[Future[Any]] = [Future() for _ in range(3)]
    underway = Underway(prompts(8), 3, dict(zip(futures, ([0, 1, 2], [3, 4, 5], [6, 7]), strict=True)))
    underway.then(pooled.begin)
    for future, numbers in list(underway.pieces.items())[::-1]:
        assert not inline.jobs
        future.set_result([groups[i].trajectories for i in numbers])
    assert len(inline.jobs) == 2, "24 completions in pieces of 16"
    inline.work()
    assert pooled.errors == {"length": 0, "fails": 0}
    found = underway.groups()
    pooled.score_groups(found)
    assert not inline.jobs, "nothing is judged twice"
    scores = [t.rewards for g in found for t in g.trajectories]
    assert pooled.errors == {"length": 0, "fails": 24}
    own.score_groups(groups)
    assert scores == [t.rewards for g in groups for t in g.trajectories]


def test_where_a_piece_fails_nothing_is_judged_ahead() -> None:
    asked: list[Any] = []
    for outcome in ("fails", "cancelled"):
        futures: list[Future[Any]] = [Future() for _ in range(2)]
        underway = Underway(prompts(2), 1, {futures[0]: [0], futures[1]: [1]})
        underway.then(asked.append)
        futures[0].set_exception(ValueError("no")) if outcome == "fails" else futures[0].cancel()
        futures[1].set_result([[]])
    assert not asked


def test_a_pool_checks_before_it_starts() -> None:
    engine = PooledEngine(make_policy(), Cluster())
    assert engine.max_length == 256
    assert engine.replaced == 0
    with pytest.raises(PosttrainError, match="samples is 0"):
        engine.generate(prompts(1), 0, SAMPLING, 0)
    engine.experts = True
    engine.close()


def test_rollouts_of_an_engine_that_plays_are_its_own() -> None:
    asked: list[Any] = []

    class Elsewhere:
        def play(self, *given: Any) -> list[Any]:
            asked.append(given)
            return []

    assert rollout(Elsewhere(), prompts(2), 3, SAMPLING, 5) == []  # type: ignore[arg-type]
    assert asked[0][1:] == (3, SAMPLING, 5, None, None)


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(PosttrainError, match=r"pip install 'posttrain\[ray\]', on all of its nodes"), joined(Cluster()):
        pass


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"workers": 0}, "workers is 0; expected at least 1"),
        ({"cpus": 0}, "cpus is 0"),
        ({"gpus": -1}, "gpus is -1"),
        ({"reward_workers": -1}, "reward_workers is -1; expected at least 0"),
        ({"piece": 0}, "piece is 0"),
    ],
)
def test_a_cluster_that_is_none(given: dict[str, Any], message: str) -> None:
    with pytest.raises(PosttrainError, match=message):
        Cluster(**given)
