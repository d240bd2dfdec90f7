"""Evolvers: new prompts in the place of old ones, by rule and by a model's own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from conftest import make_tokenizer
from posttrain.rollout.evolvers import BROADER, DEEPER, InstructionEvolver, RuleEvolver, Variation, in_place_of
from posttrain.trajectory import Completion, Prompt, Sampling
from tiny_tasks import END, step_context, tiny_policy, tiny_prompts

POLICY = tiny_policy()


def longer(prompt: Prompt, chance: np.random.Generator) -> Variation | None:
    if prompt.question.startswith("p1"):
        return None
    return Variation(prompt.question.strip() + str(chance.integers(10)), answer=len(prompt.question))


def test_a_rule_knows_the_answer() -> None:
    context = step_context(POLICY)
    found = RuleEvolver(longer)(tiny_prompts(3), context)
    assert found[1] is None
    first = found[0]
    assert first is not None
    assert first.text.startswith("p0:")
    assert first.text.endswith("\n")
    assert (first.answer, first.meta) == (4, {})
    assert first.tokens.tolist() == context.required_policy().tokenizer.encode(first.text)
    again = RuleEvolver(longer)(tiny_prompts(3), step_context(POLICY))
    assert [p.text for p in again if p] == [p.text for p in found if p], "what is random follows from the step's seed"
    assert first.key != tiny_prompts(1)[0].key


class Writer:
    """An engine that answers with given texts, cut off where they end in a tilde, and remembers what it was asked."""

    def __init__(self, *texts: str) -> None:
        self.texts, self.asked, self.sampling = list(texts), list[str](), Sampling()

    def generate(
        self, prompts: Sequence[Prompt], samples: int, sampling: Sampling, seed: int, progress: Any = None
    ) -> list[list[Completion]]:
        self.asked += [p.question for p in prompts]
        self.sampling = sampling
        token, logp = torch.tensor([5, END]), torch.zeros(2)
        return [
            [Completion(token, logp, logp, "length" if text.endswith("~") else "stop", text)]
            for text, _ in zip(self.texts, prompts, strict=True)
        ]


def test_a_model_rewrites_and_what_is_no_prompt_is_dropped() -> None:
    texts = [" A harder one? ", "", "p2:", "I'm sorry, I cannot do that.", "cut off~", "x" * 2001, "Broader."]
    engine, prompts = Writer(*texts), tiny_prompts(7)
    prompts[0].meta = {"domain": "d"}
    context = step_context(POLICY, engine=engine)
    found = InstructionEvolver()(prompts, context)
    assert [p.text.strip() if p else None for p in found] == ["A harder one?", *[None] * 5, "Broader."]
    assert found[0] is not None
    assert (found[0].answer, found[0].meta) == (None, {"domain": "d"})
    assert all(p.question.strip() in asked for p, asked in zip(prompts, engine.asked, strict=True))
    assert all(sum(words in asked for words in (*DEEPER, BROADER)) == 1 for asked in engine.asked)
    assert len({next(w for w in (*DEEPER, BROADER) if w in asked) for asked in engine.asked}) > 1
    assert engine.sampling.temperature == 0.7
    assert context.sampled == 7, "what evolving costs is counted"


def test_a_conversation_keeps_what_went_before() -> None:
    policy = tiny_policy()
    policy.tokenizer = make_tokenizer()
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
    old = Prompt(torch.tensor([1]), messages, answer="b", key=3, meta={"level": 1})
    new = in_place_of(old, Variation("Why so?", "because", {"level": 2}), policy)
    assert new.messages == [messages[0], {"role": "user", "content": "Why so?"}]
    assert new.question == "Why so?"
    assert policy.tokenizer.decode(new.tokens.tolist()).endswith("Why so?<|im_end|>\n<|im_start|>assistant\n")
    assert (new.answer, new.meta) == ("because", {"level": 2})
    kept = in_place_of(old, Variation("Why so?"), policy)
    assert kept.meta == {"level": 1}
    assert kept.meta is not old.meta
