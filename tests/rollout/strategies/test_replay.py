"""Replay: who is tried, who is shown, and that every sequence says whose it is."""

from __future__ import annotations

from posttrain.rollout.strategies.replay import Replay
from posttrain.trajectory import Prompt
from tiny_tasks import Scripted, step_context, tiny_policy, tiny_prompts

POLICY = tiny_policy()


def prompts() -> list[Prompt]:
    found = tiny_prompts(4)
    for prompt, name in zip(found, ("new", "copy", "new", "sort"), strict=True):
        prompt.meta = {"domain": name}
    return found


def test_some_domains_are_tried_and_some_are_shown() -> None:
    context = step_context(POLICY, engine=Scripted({p.key: "abcd" for p in prompts()}))
    groups = Replay(("copy", "sort"))(prompts(), context)
    assert [(g.prompt.key if g.prompt else None, len(g)) for g in groups] == [
        (prompts()[0].key, 4), (prompts()[2].key, 4), (prompts()[1].key, 1), (prompts()[3].key, 1)
    ]  # fmt: skip
    assert context.sampled == 8
    assert [g.trajectories[0].source for g in groups] == ["policy", "policy", "replay", "replay"]
    names = [set(t.facts) for g in groups for t in g.trajectories]
    assert names == [{"channel/new"}] * 8 + [{"channel/copy"}, {"channel/sort"}]
    shown = groups[2].trajectories[0]
    assert shown.text == "abcdefghi1"
    assert shown.reward > 0.5, "what is shown is scored too"


def test_the_demonstration_itself_stays_as_it_is() -> None:
    given = prompts()
    Replay(("copy",))(given, step_context(POLICY, engine=Scripted({p.key: "abcd" for p in given})))
    assert given[1].demonstration is not None
    assert given[1].demonstration.source == "expert"
    assert given[1].demonstration.facts == {}


def test_demonstrations_are_asked_for_only_where_something_is_shown() -> None:
    assert Replay(("copy",)).demonstrations
    assert not Replay().demonstrations
    context = step_context(POLICY)
    assert {t.source for g in Replay(("copy", "sort", "new"))(prompts(), context) for t in g.trajectories} == {"replay"}
    assert context.sampled == 0
