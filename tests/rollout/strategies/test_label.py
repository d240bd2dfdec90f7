"""The label joins its prompt's rollouts, written as they are."""

from __future__ import annotations

import pytest
import torch
from scripted import TOKENIZER, context, prompt

from posttrain.data.templates import render_completion
from posttrain.rollout.strategies.label import Label, spaced_alike


@pytest.mark.parametrize(("text", "examples", "expected"), [
    ("[1,2,3]", ["[4, 5]", "[6, 7]"], "[1, 2, 3]"),
    ("[1, 2, 3]", ["[4,5]", "[6,7]", "[8, 9]"], "[1,2,3]"),
    ("[1,  2]", ["[4, 5]"], "[1, 2]"),
    ('{"a":1,"b":2}', ['{"a": 3,"b": 4}'], '{"a": 1,"b": 2}'),
    ("[1,2]", ["no list"], "[1,2]"),  # nothing to go by
    ("[1,2]", ["[1, 2]", "[1,2]"], "[1,2]"),  # as often one way as the other
    ("a,\nb", ["c, d"], "a,\nb"),  # the end of a line stays
    ("a;b:c", ["d; e: f"], "a; b: c"),
])  # fmt: skip
def test_punctuation_is_spaced_as_in_the_examples(text: str, examples: list[str], expected: str) -> None:
    assert spaced_alike(text, examples) == expected


def test_every_group_ends_with_its_label() -> None:
    prompts = [prompt("a", "yes"), prompt("b", "oh yes")]
    groups = Label()(prompts, context({"a": ["no", "yes"], "b": ["no", "no"]}, 2))
    assert [[t.source for t in g.trajectories] for g in groups] == [["policy", "policy", "expert"]] * 2
    assert [g.trajectories[-1].reward for g in groups] == [1, 0.5]


@pytest.mark.parametrize("chat", [True, False])
def test_an_aligned_label_is_the_tokens_of_its_new_text(chat: bool) -> None:
    one = prompt("a", "[1,2]", answer="[1, 2]", chat=chat)
    (group,) = Label(align=True)([one], context({one.question: ["[3, 4]", "no"]}, 2))
    label = group.trajectories[-1]
    tokens, mask = render_completion(TOKENIZER, "a", "[1, 2]", chat=chat)
    assert label.text == "[1, 2]"
    assert label.reward == 1
    assert torch.equal(label.tokens, tokens)
    assert torch.equal(label.action_mask, mask)
    assert torch.equal(label.tokens[: label.prompt_length], one.tokens)
    assert label.source == "expert"


def test_an_aligned_label_that_is_worth_less_is_not_taken() -> None:
    one = prompt("a", "[1,2]", answer="[1,2]")
    (group,) = Label(align=True)([one], context({"a": ["[3, 4]"]}, 1))
    assert group.trajectories[-1].text == "[1,2]"
    assert group.trajectories[-1].reward == 1
