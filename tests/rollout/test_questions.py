"""Questions that a model writes itself: what it is asked, and what of its answers is kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from posttrain.rollout import questions
from posttrain.trajectory import Completion, Finish, PosttrainError, Prompt, Sampling
from tiny_tasks import TOKENIZER, tiny_policy


class Says:
    def __init__(self, texts: list[tuple[str, Finish]], size: int) -> None:
        self.texts, self.size = texts, size
        self.asked: list[Prompt] = []

    def generate(self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int) -> list[Any]:
        self.asked += prompts
        logp = torch.zeros(1)
        said = [Completion(torch.tensor([3]), logp, logp, finish, text) for text, finish in self.texts]
        return [said[i : i + self.size] for i in range(0, len(said), self.size)]


def test_new_finished_questions_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Says([(" What is 3? ", "stop"), ("How  MANY?", "stop"), ("what is 3?", "stop"),
                   ("Where is", "length"), ("  ", "stop"), ("Why?", "stop")], 3)  # fmt: skip
    monkeypatch.setattr(questions, "engine_for", lambda policy: engine)
    found = questions.write_questions(tiny_policy(), ["How many?", "Who?"], template="<{question}>", samples=3)
    assert found == ["What is 3?", "Why?"]
    assert [TOKENIZER.decode(p.tokens) for p in engine.asked] == ["<How many?>", "<Who?>"]


def test_the_policy_writes_them() -> None:
    def written(seed: int) -> list[str]:
        return questions.write_questions(
            tiny_policy(), ["a?", "b?"], template="{question}", samples=40, sampling=Sampling(max_tokens=40), seed=seed
        )

    assert written(0) == written(0)
    assert len(set(written(0))) == len(written(0)) > 0


def test_a_template_shows_the_question() -> None:
    assert "{question}" in questions.ANOTHER
    with pytest.raises(PosttrainError, match=r"no \{question\}"):
        questions.write_questions(tiny_policy(), ["a?"], template="write one")
