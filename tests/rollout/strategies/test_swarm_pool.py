"""Rollouts shared as text: what a node publishes, what another reads, and which groups it takes."""

from __future__ import annotations

import copy

import pytest
import torch

from conftest import make_tokenizer
from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.context import StepContext
from posttrain.rollout.strategies.swarm import Pool, Record, Shared
from posttrain.rollout.strategy import Plain
from posttrain.trajectory import Group, PosttrainError, Prompt
from tiny_tasks import END, TOKENIZER, Scripted, letters, step_context, tiny_policy, tiny_prompts

pytestmark = pytest.mark.limit("sapo")


def record(name: str) -> Record:
    return Record(name, (), "0", 1, {}, ("a", "1"), (True, True))


def scripted(*texts: str, reward: object = letters, **fields: object) -> StepContext:
    keys = [p.key for p in tiny_prompts(len(texts))]
    engine = Scripted(dict(zip(keys, texts, strict=True)))
    return step_context(tiny_policy(), reward, engine=engine, group=len(texts[0]), **fields)  # type: ignore[arg-type]


def test_a_pool_gives_what_others_published_before() -> None:
    pool = Pool()
    for node in (0, 1, 2):
        for round_ in (0, 1, 2):
            if (node, round_) != (2, 2):  # the third node left
                pool.publish(node, round_, [record(f"{node}.{round_}")])
    assert [r.text for r in pool.others(0, 3)] == ["1.2", "2.1"]  # however old the newest is
    assert [r.text for r in pool.others(0, 2)] == ["1.1", "2.1"]  # never of this round: the order of nodes is free
    assert [r.text for r in pool.others(1, 2)] == ["0.1", "2.1"]
    assert pool.others(0, 0) == []
    pool.publish(1, 2, [record("more")])
    assert [r.text for r in pool.others(0, 3)] == ["1.2", "more", "2.1"]


def test_copies_share_the_pool() -> None:
    strategy = Shared()
    copied = copy.deepcopy(strategy)
    assert copied is not strategy
    assert copied.pool is strategy.pool
    assert Shared().pool is not strategy.pool


@pytest.mark.parametrize("chat", [False, True])
def test_a_record_read_by_a_clone_is_the_group_it_was_made_of(chat: bool) -> None:
    # card 053 (b): the same tokens, and so with the same weights the same gradient
    policy = CausalPolicy(tiny_policy().model, make_tokenizer()) if chat else tiny_policy()
    prompt = render_prompt(policy.tokenizer, "p0") if chat else tiny_prompts(1)[0]
    (group,) = Plain()([prompt], step_context(policy, engine=Scripted({prompt.key: ["So: 12", "3", ""]}), group=3))
    cut = group.trajectories[0]
    cut.tokens, cut.action_mask, cut.finish = cut.tokens[:-1], cut.action_mask[:-1], "length"
    read = Record.of(group).read(policy)
    assert read is not None
    assert read.prompt is not None
    assert torch.equal(read.prompt.tokens, prompt.tokens)
    assert (read.prompt.answer, read.prompt.key, read.prompt.meta) == (prompt.answer, prompt.key, prompt.meta)
    for ours, theirs in zip(read.trajectories, group.trajectories, strict=True):
        assert torch.equal(ours.tokens, theirs.tokens)
        assert torch.equal(ours.action_mask, theirs.action_mask)
        assert (ours.text, ours.finish) == (theirs.text, theirs.finish)
        assert ours.source == "replay"
        assert ours.behaviour_logp is None  # the sender's are never used
    assert [t.tokens[-1] == END for t in read.trajectories] == [False, True, True]


def test_another_tokenizer_reads_the_text() -> None:
    class Shouting:
        """Twice as many tokens for everything."""

        eos_token_id = END
        chat_template = None

        def encode(self, text: str, add_special_tokens: bool = True, **_: object) -> list[int]:
            return [t for c in TOKENIZER.encode(text, add_special_tokens=False) for t in (c, c)]

    policy = tiny_policy()
    policy.tokenizer = Shouting()  # type: ignore[assignment]
    read = Record("p0:", (), "0", 4, {}, ("ab", "1"), (True, False)).read(policy)
    assert read is not None
    assert [len(t.tokens) for t in read.trajectories] == [6 + 4 + 1, 6 + 2]


def test_only_what_fits_is_read() -> None:
    policy = tiny_policy(max_position_embeddings=8)
    read = Record("p0:", (), "0", 4, {}, ("abcdefghi", "1", ""), (True, True, False)).read(policy)
    assert read is not None
    assert [(len(t.tokens), t.finish) for t in read.trajectories] == [(8, "length"), (5, "stop")]
    assert Record("p0:", (), "0", 4, {}, ("", "1"), (False, True)).read(policy) is None  # one is no group
    assert Record("p0:    too long", (), "0", 4, {}, ("a", "1"), (True, True)).read(policy) is None


def test_foreign_groups_whose_rewards_are_equal_are_never_taken() -> None:
    # card 053 (c)
    pool = Pool()
    Shared(1, 1, pool=pool, node=1)(tiny_prompts(4), scripted("ab", "a1", "12", "b2", step=0))
    for seed in range(20):
        context = scripted("ab", "a1", step=1, seed=seed)
        groups = Shared(1, 3, pool=pool, node=0)(tiny_prompts(2), context)
        foreign = [g for g in groups if g.trajectories[0].source == "replay"]
        assert {tuple(t.text for t in g.trajectories) for g in foreign} == {("a", "1"), ("b", "2")}
        assert context.metrics["foreign_groups"] == 2
        assert len(groups) == 4  # the place that stays empty is the node's own


def test_own_groups_fill_the_first_round() -> None:
    context = scripted("ab", "a1", "b2")
    groups = Shared(1, 2)(tiny_prompts(3), context)
    assert [g.trajectories[0].source for g in groups] == ["policy"] * 3
    assert context.metrics == {"reward": sum(t.reward for g in groups for t in g.trajectories) / 6, "foreign_groups": 0}


def test_all_are_published_and_the_first_are_trained_on() -> None:
    pool = Pool()
    Shared(1, 1, pool=pool, node=1)(tiny_prompts(2), scripted("a1", "b2", step=0))
    assert [r.completions for r in pool.others(0, 1)] == [("a", "1"), ("b", "2")]
    context = scripted("a1", "c3", step=1)
    groups = Shared(1, 1, pool=pool, node=0)(tiny_prompts(2), context)
    assert [g.trajectories[0].source for g in groups] == ["policy", "replay"]
    assert groups[0].trajectories[0].text == "a"
    assert context.metrics["reward"] == 0.25  # of all its own completions, not of what it trains on
    assert len(pool.others(1, 2)) == 2


def test_rewards_are_the_nodes_own() -> None:
    pool = Pool()
    Shared(1, 1, pool=pool, node=1)(tiny_prompts(1), scripted("a1", step=0, reward=lambda text, prompt: 9.0))
    (_, foreign) = Shared(1, 1, pool=pool, node=0)(tiny_prompts(1), scripted("bc", step=1))
    assert [t.reward for t in foreign.trajectories] == [0.5, 0.0]
    assert [t.rewards for t in foreign.trajectories] == [{"letters": 0.5}, {"letters": 0.0}]


def test_picks_uniformly_or_the_best() -> None:
    pool = Pool()
    texts = ("a1", "b2", "c3", "de", "f4")
    Shared(1, 1, pool=pool, node=1)(tiny_prompts(5), scripted(*texts, step=0))

    def value(text: str, prompt: Prompt) -> float:
        return {"c": 3.0, "b": 2.0}.get(text, float(text.isalpha()))

    def picked(pick: str, seed: int) -> list[str]:
        context = scripted("a1", step=1, seed=seed, reward=value)
        groups: list[Group] = Shared(1, 2, pick, pool=pool)(tiny_prompts(1), context)  # type: ignore[arg-type]
        return [g.trajectories[0].text for g in groups[1:]]

    assert picked("best", 0) == picked("best", 1) == ["c", "b"]
    found = [picked("uniform", seed) for seed in range(60)]
    assert {text for texts in found for text in texts} == {"a", "b", "c", "f"}
    assert all(len(set(texts)) == 2 for texts in found)


def test_a_node_needs_enough_prompts() -> None:
    with pytest.raises(PosttrainError, match="4 groups of its own"):
        Shared()(tiny_prompts(2), step_context(tiny_policy()))


def test_without_foreign_groups_it_is_the_plain_strategy() -> None:
    # card 053 (a)
    plain, ours = (s(tiny_prompts(), step_context(tiny_policy())) for s in (Plain(), Shared(3, 0)))
    for g, h in zip(plain, ours, strict=True):
        assert all(torch.equal(a.tokens, b.tokens) for a, b in zip(g.trajectories, h.trajectories, strict=True))
        assert [t.reward for t in g.trajectories] == [t.reward for t in h.trajectories]
