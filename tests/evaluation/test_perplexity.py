"""Perplexity and divergence of windows: known limits, and the definitions written out on logits."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from conftest import make_model, make_tokenizer
from posttrain.evaluation import perplexity as module
from posttrain.evaluation.perplexity import encode, perplexity, predict, windows
from posttrain.lab.tokenizer import character_tokenizer
from posttrain.models.causal import CausalPolicy
from posttrain.trajectory import Group, PosttrainError, Trajectory
from tiny_models import make_policy

TEXT = "The quick brown fox jumps over the lazy dog, twice. " * 4


def policy(seed: int = 0, **config) -> CausalPolicy:
    return CausalPolicy(make_model(seed, **config), make_tokenizer(), f"tiny-{seed}")


def uniform() -> CausalPolicy:
    made = policy(tie_word_embeddings=False)
    with torch.no_grad():
        made.model.lm_head.weight.zero_()
    return made


def test_a_uniform_model_has_as_many_choices_as_tokens():
    assert perplexity(uniform(), TEXT, length=32) == pytest.approx(259, rel=1e-5)


def test_a_model_does_not_diverge_from_itself():
    model = policy()
    found = predict(model, windows(encode(model.tokenizer, TEXT), 32), of=model)
    assert found.divergence == pytest.approx(0, abs=1e-6)
    assert found.other is not None
    assert found.other.perplexity == found.perplexity


@pytest.mark.parametrize("name", ["llama", "mamba"])  # one that packs, one that is computed padded
def test_against_the_definitions(name):
    """Card 000: the mean over windows of mean losses of L - 1 targets; KL(float || small) over the whole vocabulary."""
    first, second = (make_policy(name, make_tokenizer(), seed) for seed in (0, 1))
    tokens = torch.randint(0, 64, (45,), generator=torch.Generator().manual_seed(0))
    found = predict(second, windows(tokens, 10), of=first)
    losses, kls = [], []
    for start in range(0, 40, 10):
        part = tokens[start : start + 10]
        with torch.no_grad():
            p, q = (m.model(input_ids=part[None]).logits[0, :-1].double().log_softmax(-1) for m in (first, second))
        losses.append(-float(q.gather(1, part[1:, None]).mean()))
        kls.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert found.loss == pytest.approx(np.array(losses), rel=1e-5)
    assert found.kl == pytest.approx(np.array(kls), rel=1e-4)
    assert found.tokens.tolist() == [9] * 4
    assert found.perplexity == pytest.approx(math.exp(np.mean(losses)), rel=1e-5)


def test_the_order_of_windows_and_the_size_of_batches_do_not_matter(monkeypatch):
    model = policy()
    parts = windows(encode(model.tokenizer, TEXT), 16)
    whole = predict(model, parts)
    monkeypatch.setattr(module, "TOKENS", 40)
    assert predict(model, parts[::-1]).loss[::-1] == pytest.approx(whole.loss, rel=1e-5)


def test_sequences_count_by_their_predicted_tokens():
    model, other = uniform(), policy(1)
    tokens = encode(model.tokenizer, TEXT)
    long, short = tokens[:20], tokens[20:24]
    mask = torch.arange(20) >= 15  # a prompt is not predicted
    groups = [Group([Trajectory(long, mask)]), Group([Trajectory(short, torch.ones(4, dtype=torch.bool))])]
    found = predict(other, groups)
    assert found.tokens.tolist() == [5, 3]
    assert found.perplexity == pytest.approx(math.exp((5 * found.loss[0] + 3 * found.loss[1]) / 8))


def test_windows_do_not_overlap_and_the_rest_is_dropped():
    tokens = torch.arange(23)
    found = [group.trajectories[0].tokens.tolist() for group in windows(tokens, 10)]
    assert found == [list(range(10)), list(range(10, 20))]
    assert len(windows(tokens, 10, most=1)) == 1
    assert [g.trajectories[0].length for g in windows(tokens, 100)] == [23]


def test_the_start_token_stands_in_front_where_the_tokenizer_writes_it():
    lab = character_tokenizer()
    assert encode(lab, "ab").tolist() == [lab.bos_token_id, *lab.encode("ab", add_special_tokens=False)]
    assert encode(make_tokenizer(), "ab").tolist() == make_tokenizer().encode("ab", add_special_tokens=False)


def test_progress_reaches_its_end():
    seen = []
    predict(policy(), windows(torch.arange(40), 10), progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: windows(torch.arange(9), 1), "windows of 1 tokens hold nothing to predict"),
        (lambda: windows(torch.arange(1), 8), "the text has 1 tokens; expected at least 2"),
        (lambda: windows(torch.arange(0), 8), "the text has 0 tokens; expected at least 2"),
        (lambda: predict(policy(), []), "no window to predict"),
        (lambda: perplexity(policy(), TEXT * 3, length=300), "a sequence of 300 tokens exceeds the model's context"),
        (
            lambda: predict(policy(), windows(torch.arange(9), 4), of=policy(vocab_size=300)),
            "have vocabularies of 259 and 300 tokens",
        ),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(PosttrainError, match=message):
        call()
