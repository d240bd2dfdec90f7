"""vLLM in this process: completions and log-probabilities of the embedded engine, always by present weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from scipy import stats
from vllm_models import GREEDY, LOGP, assert_same, become, embedded, logits_of, make_policy, prompts, tokens

from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.sampling import _truncate
from posttrain.rollout.vllm.engine import VllmEngine
from posttrain.rollout.vllm.in_process import InProcess
from posttrain.trajectory import PosttrainError, Prompt, Sampling

pytestmark = pytest.mark.vllm


class Counting(InProcess):
    """Counts how often weights were sent."""

    updates = 0

    def update(self, weights: Any) -> None:
        self.updates += 1
        super().update(weights)


@pytest.fixture(scope="module")
def engine() -> Iterator[VllmEngine]:
    made = VllmEngine(make_policy(), Counting(options={"max_model_len": 128}))
    yield made
    made.close()
    assert made.exchange.folder is None


@pytest.fixture
def policy(engine: VllmEngine) -> CausalPolicy:
    """The engine's policy with the weights of seed 0."""
    policy = make_policy()
    engine.serve(policy)
    return policy


def test_greedy_completions_are_the_embedded_engines(engine: VllmEngine, policy: CausalPolicy) -> None:
    found = engine.generate(prompts(), 2, GREEDY, 0)
    expected = embedded(policy)
    assert_same([row[:1] for row in found], expected)
    assert_same([row[1:] for row in found], expected)


def test_present_weights_draw(engine: VllmEngine, policy: CausalPolicy) -> None:
    """In place, without a restart: also the vocabulary projection, which shares the embedding's weights."""
    before = engine.generate(prompts(), 1, GREEDY, 0)
    started = engine.backend.llm  # type: ignore[attr-defined]
    for seed in (1, 2):
        become(policy, make_policy(seed))
        after = engine.generate(prompts(), 1, GREEDY, 0)
        assert tokens(after) != tokens(before)
        assert_same(after, embedded(policy))
    assert engine.backend.llm is started  # type: ignore[attr-defined]


def test_weights_are_sent_once_after_they_changed(engine: VllmEngine, policy: CausalPolicy) -> None:
    backend = engine.backend
    assert isinstance(backend, Counting)
    engine.generate(prompts(), 1, GREEDY, 0)
    before = backend.updates
    engine.generate(prompts(), 1, GREEDY, 0)
    assert backend.updates == before
    with torch.no_grad():
        next(iter(policy.model.parameters())).mul_(1.01)
    engine.generate(prompts(), 1, GREEDY, 0)
    assert backend.updates == before + 1
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


def test_an_adapter_is_merged(engine: VllmEngine, policy: CausalPolicy) -> None:
    adapted = add_lora(policy, rank=4, seed=0)
    try:
        with torch.no_grad():
            for name, parameter in adapted.trainable_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        found = engine.serve(adapted).generate(prompts(), 1, GREEDY, 0)
        expected = EmbeddedEngine(adapted).generate(prompts(), 1, GREEDY, 0)
        assert_same(found, expected)
    finally:
        adapted.model.unload()
    assert tokens(found) != tokens(embedded(policy))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probabilities_are_those_of_the_trainer(
    engine: VllmEngine, policy: CausalPolicy, temperature: float
) -> None:
    found = engine.generate(prompts(), 3, Sampling(max_tokens=16, temperature=temperature), 5)
    for prompt, row in zip(prompts(), found, strict=True):
        for completion in row:
            logp = (logits_of(policy, prompt, completion) / temperature).log_softmax(-1)
            own = logp.gather(1, completion.tokens[:, None])[:, 0]
            torch.testing.assert_close(completion.logp, own, atol=LOGP, rtol=0)
            assert torch.equal(completion.logp, completion.logp_full)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(16, 0.8, top_k=5), Sampling(16, 1.0, top_p=0.6), Sampling(16, 1.0, min_p=0.2)],
    ids=["top-k", "top-p", "min-p"],
)
def test_truncated_log_probabilities_are_as_sampled(
    engine: VllmEngine, policy: CausalPolicy, sampling: Sampling
) -> None:
    """vLLM keeps the tokens that we would keep, and both log-probabilities are exact."""
    dropped = 0.0
    for prompt, row in zip(prompts(), engine.generate(prompts(), 3, sampling, 5), strict=True):
        for completion in row:
            logits = logits_of(policy, prompt, completion) / sampling.temperature
            full = torch.logsumexp(logits, -1)
            kept, index = _truncate(logits, full, sampling)
            place = (index == completion.tokens[:, None]).float().argmax(-1)
            chosen = kept.gather(1, place[:, None])[:, 0]
            torch.testing.assert_close(completion.logp, chosen - torch.logsumexp(kept, -1), atol=LOGP, rtol=0)
            torch.testing.assert_close(completion.logp_full, chosen - full, atol=LOGP, rtol=0)
            dropped = max(dropped, float((completion.logp - completion.logp_full).max()))
    assert dropped > 0.1


def test_tokens_are_drawn_with_their_probabilities(engine: VllmEngine, policy: CausalPolicy) -> None:
    prompt, draws = prompts()[0], 1500
    ((*drawn,),) = engine.generate([prompt], draws, Sampling(max_tokens=1), 3)
    counts = torch.zeros(259)
    for completion in drawn:
        counts[completion.tokens[0]] += 1
    expected = policy.model(prompt.tokens[None]).logits[0, -1].softmax(-1).detach() * draws
    common = expected > 5
    found = [*counts[common].tolist(), float(counts[~common].sum())]
    wanted = torch.cat([expected[common], expected[~common].sum()[None]]).double()
    assert stats.chisquare(found, (wanted / wanted.sum() * draws).tolist()).pvalue > 1e-3


def test_a_completion_depends_on_its_own_seed(engine: VllmEngine, policy: CausalPolicy) -> None:
    sampling = Sampling(max_tokens=16)
    whole = engine.generate(prompts(), 3, sampling, 5)
    assert tokens(engine.generate(prompts(), 3, sampling, 5)) == tokens(whole)
    assert tokens(engine.generate(prompts()[2:], 3, sampling, 5)) == tokens(whole[2:])
    assert tokens(engine.generate(prompts(), 3, sampling, 6)) != tokens(whole)
    assert all(len({tuple(c.tokens.tolist()) for c in row}) == 3 for row in whole)


def test_stop_strings_and_end_tokens_stay_in_the_completion(engine: VllmEngine, policy: CausalPolicy) -> None:
    plain = embedded(policy)
    (longest,) = max(plain, key=lambda row: len(row[0].text))
    stopped = Sampling(max_tokens=24, temperature=0, stop=(longest.text[2:4],))
    expected = embedded(policy, stopped)
    assert any(row[0].finish == "stop" and longest.text[2:4] in row[0].text for row in expected)
    assert_same(engine.generate(prompts(), 1, stopped, 0), expected)
    drawn = Sampling(max_tokens=100, temperature=1.0)
    ends = [c for row in engine.generate(prompts(), 16, drawn, 0) for c in row if c.finish == "stop"]
    assert ends
    assert all([t in policy.end_tokens for t in c.tokens.tolist()].index(True) == len(c.tokens) - 1 for c in ends)


def test_progress_is_told(engine: VllmEngine, policy: CausalPolicy) -> None:
    told: list[tuple[int, int]] = []
    engine.generate(prompts(), 3, Sampling(max_tokens=16), 5, lambda *at: told.append(at))
    assert told == [(done, 12) for done in range(1, 13)]


def test_what_does_not_fit_is_an_error(engine: VllmEngine, policy: CausalPolicy) -> None:
    engine.generate(prompts(), 1, GREEDY, 0)
    assert engine.max_length == 128
    room = Prompt(torch.full((120,), 60))
    ((completion,),) = engine.generate([room], 1, Sampling(max_tokens=24, temperature=0), 0)
    assert len(completion.tokens) == 8
    assert completion.finish == "length"
    with pytest.raises(PosttrainError, match=r"prompt 0 has 128 tokens and vLLM's context is 128"):
        engine.generate([Prompt(torch.full((128,), 60))], 1, GREEDY, 0)


def test_another_model_is_noticed(engine: VllmEngine, policy: CausalPolicy) -> None:
    """Weights that fit, of a model that computes otherwise: the probe compares what both make of them."""
    become(policy, make_policy(4))
    with halved(policy), pytest.raises(PosttrainError, match=r"does not compute tiny-0 as the trainer does"):
        engine.generate(prompts(), 1, GREEDY, 0)
    assert_same(engine.generate(prompts(), 1, GREEDY, 0), embedded(policy))


@contextmanager
def halved(policy: CausalPolicy) -> Iterator[None]:
    """The policy with half the logits inside the block, of which vLLM knows nothing."""

    def halve(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state * 0.5
        return output

    handle = policy.body.register_forward_hook(halve)
    try:
        yield
    finally:
        handle.remove()
