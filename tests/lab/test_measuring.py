"""Headroom: counted by hand on a policy that knows some answers."""

from __future__ import annotations

import pytest
import torch

from posttrain.lab import measuring as module
from posttrain.lab.measuring import measure
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.lab.worlds import mix, rewriting, turns
from posttrain.trajectory import Completion


class Knows:
    """An engine that answers the n-th sample of a prompt right where `right(prompt, n)` says so."""

    def __init__(self, right) -> None:
        self.right = right

    def generate(self, prompts, samples, sampling, seed, progress=None):
        return [[self._completion(p, n) for n in range(samples)] for p in prompts]

    def _completion(self, prompt, n):
        text = str(prompt.answer) if self.right(prompt, n) else "?"
        tokens = torch.tensor([*character_tokenizer().encode(text, add_special_tokens=False), 2])
        return Completion(tokens, torch.zeros(len(tokens)), torch.zeros(len(tokens)), "stop", text)


class Policy:
    tokenizer = character_tokenizer()
    model = torch.nn.Linear(3, 4)


@pytest.fixture
def measured(monkeypatch):
    def measure_with(right, task, **options):
        monkeypatch.setattr(module, "engine_for", lambda policy, rows: Knows(right))
        return measure(Policy(), task, **options)

    return measure_with


def test_shares_by_domain_and_the_best_of_several(measured):
    task = mix({"a": rewriting(train=0, heldout=6), "b": rewriting(operation="sort", train=0, heldout=2, seed=1)})
    found = measured(lambda p, n: p.meta["domain"] == "a" and n == 0, task, samples=4)
    assert found.domains == {"a": 0.25, "b": 0.0}
    assert found.accuracy == pytest.approx(6 / 32)
    assert found.best_of == pytest.approx(6 / 8)
    assert (found.prompts, found.samples, found.parameters) == (8, 4, 16)


def test_a_limit_takes_the_first_problems(measured):
    task = rewriting(train=0, heldout=9)
    assert measured(lambda p, n: True, task, samples=1, limit=3).prompts == 3


def test_tasks_of_several_turns_are_played(measured):
    task = turns(train=0, heldout=5)
    assert measured(lambda p, n: True, task, samples=2).accuracy == 1.0
    assert measured(lambda p, n: False, task, samples=2).accuracy == 0.0
