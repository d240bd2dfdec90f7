"""One prompt whose completion never ends: it stops at the limit of tokens, and the others do not wait for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from posttrain import methods
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import Prompt, Sampling
from tiny_training import TOKENIZER, make_policy, online, prompts

AGAIN, END, LIMIT = 40, 2, 48
MakeEngine = Callable[[CausalPolicy], EmbeddedEngine | PlainEngine]


@torch.no_grad()
def looping_policy() -> CausalPolicy:
    """Says AGAIN after AGAIN for ever, and the end token after any other token: each layer adds nothing, so that the
    last token alone decides."""
    policy = make_policy(tie_word_embeddings=False)
    model = policy.model
    for layer in model.model.layers:
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
    model.model.norm.weight.fill_(1)
    embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    embedding.zero_()[:, 0] = 1
    embedding[AGAIN] = torch.eye(32)[1]
    head.zero_()
    head[END, 0] = head[AGAIN, 1] = 20
    return policy


def starts() -> list[Prompt]:
    """Ten prompts; the third never ends."""
    found = [Prompt(torch.tensor([60 + i, 61 + i]), key=i) for i in range(10)]
    found[2].tokens[-1] = AGAIN
    return found


@pytest.mark.parametrize("make", [lambda p: EmbeddedEngine(p, rows=4), lambda p: PlainEngine(p, rows=4)])
def test_it_stops_at_the_limit_and_is_cut_off(make: MakeEngine) -> None:
    for row, prompt in zip(make(looping_policy()).generate(starts(), 2, Sampling(LIMIT), 0), starts(), strict=True):
        for completion in row:
            endless = prompt.key == 2
            assert completion.finish == ("length" if endless else "stop")
            assert completion.tokens.tolist() == ([AGAIN] * LIMIT if endless else [END])


def test_the_others_do_not_wait_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """All others are done before it, in the places that it leaves; the model runs no more often than it has tokens."""
    policy = looping_policy()
    engine = EmbeddedEngine(policy, rows=4)
    events: list[str] = []
    forward = type(policy.body).forward

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        events.append("model")
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(policy.body), "forward", counted)
    engine.generate(starts(), 1, Sampling(LIMIT), 0, lambda done, total: events.append(f"{done} of {total}"))
    others_done = events.index("9 of 10")
    assert events[others_done:].count("model") > LIMIT // 2, "it went on for long after all others were done"
    assert events.count("model") <= LIMIT + 10
    assert events[-1] == "10 of 10"


def test_a_step_with_one_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step ends, and says what share of its completions were cut off."""
    settings = {"steps": 2, "batch": 4, "group": 2, "max_tokens": LIMIT, "learning_rate": 1e-4}
    found = prompts(4)
    for prompt in found:
        prompt.tokens = torch.cat([prompt.tokens, torch.tensor([AGAIN if prompt.key == 1 else 50])])
    monkeypatch.setattr("tiny_training.prompts", lambda rows: found)
    trainer = online(methods.grpo().with_settings(**settings), looping_policy(), lambda c, p: float(len(c)), rows=4)
    metrics = trainer.advance()
    assert metrics["truncated"] == 2 / 8
    assert metrics["length"] == (2 * LIMIT + 6) / 8
    trainer.advance()
    assert trainer.progress.step == 2
    assert TOKENIZER.eos_token_id == END
