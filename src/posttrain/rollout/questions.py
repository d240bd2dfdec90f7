"""Questions that a model writes itself: more prompts for methods that need no answers (MM-UPT, card 019)."""

from __future__ import annotations

import re
from collections.abc import Sequence

from posttrain.data.templates import render_prompt
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.engine_choice import engine_for
from posttrain.trajectory import PosttrainError, Sampling

ANOTHER = """\
Here is a question:
{question}

Write one new question on the same material that differs from it and can be answered on its own. Write the question \
alone, without its answer."""


def write_questions(
    policy: CausalPolicy,
    questions: Sequence[str],
    *,
    template: str = ANOTHER,
    samples: int = 1,
    sampling: Sampling | None = None,
    seed: int = 0,
) -> list[str]:
    """New questions in the manner of given ones ("in-context" synthesis), without answers; a vote supplies those.

    Repetitions, also of the given questions, empty ones and such as were cut off are left out, so fewer than
    `samples` a question may come back.

    Args:
        template: what the policy is asked, a user turn (plain text without a chat template); {question} is filled in.
        samples: new questions asked for, a given one. sampling: 128 tokens at temperature 1 where None.
        seed: of the sampling.

    Raises:
        PosttrainError: a template without {question}.

    Reference: Unsupervised Post-Training for Multi-Modal LLM Reasoning via GRPO, 2025, arXiv 2505.22453 (card 019).
    """
    if "{question}" not in template:
        raise PosttrainError("the template has no {question}; expected a place for the question that is imitated")
    prompts = []
    for key, question in enumerate(questions):
        prompt = render_prompt(policy.tokenizer, template.replace("{question}", question))
        prompt.key = key
        prompts.append(prompt)
    written = engine_for(policy).generate(prompts, samples, sampling or Sampling(), seed)
    seen = {_normal(question) for question in questions}
    found = []
    for completion in (c for row in written for c in row):
        text = completion.text.strip()
        if completion.finish == "stop" and text and _normal(text) not in seen:
            seen.add(_normal(text))
            found.append(text)
    return found


def _normal(question: str) -> str:
    return re.sub(r"\s+", " ", question).strip().casefold()
