"""The contract of engines in this process, for the embedded and the plain one alike: exact, reproducible, no leaks."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch

from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.rollout.rollout import rollout
from posttrain.trajectory import Completion, PosttrainError, Prompt, Sampling
from tiny_models import PACKING, PADDED, make_policy, plain_log_likelihood, random_tokens

ENGINES = (EmbeddedEngine, PlainEngine)
CASES = [(EmbeddedEngine, name) for name in PACKING] + [(PlainEngine, name) for name in (*PADDED, "llama", "gemma2")]
SAMPLING = Sampling(max_tokens=12)


def make_prompts(lengths: tuple[int, ...] = (5, 1, 9, 3), seed: int = 0) -> list[Prompt]:
    draw = torch.Generator().manual_seed(seed)
    return [Prompt(random_tokens(n, draw), key=10 + i) for i, n in enumerate(lengths)]


def end_with(policy: CausalPolicy, *tokens: int) -> None:
    policy.model.generation_config.eos_token_id = list(tokens)


def without_end(policy: CausalPolicy) -> CausalPolicy:
    policy.model.generation_config.eos_token_id = []
    policy.tokenizer = cast(Any, _NoEnd(policy.tokenizer))
    return policy


class _NoEnd:
    """The tokenizer without an end token, so that completions run to their limit."""

    def __init__(self, tokenizer) -> None:
        self.tokenizer, self.eos_token_id = tokenizer, None

    def decode(self, *args, **options):
        return self.tokenizer.decode(*args, **options)


def tokens_of(found: list[list[Completion]]) -> list[list[list[int]]]:
    return [[c.tokens.tolist() for c in row] for row in found]


def flat(found: list[list[Completion]]) -> list[Completion]:
    return [c for row in found for c in row]


def assert_equal(found: list[list[Completion]], expected: list[list[Completion]]) -> None:
    assert tokens_of(found) == tokens_of(expected)
    for row, other in zip(found, expected, strict=True):
        for one, two in zip(row, other, strict=True):
            assert (one.finish, one.text) == (two.finish, two.text)
            torch.testing.assert_close(one.logp, two.logp, atol=2e-5, rtol=1e-5)
            torch.testing.assert_close(one.logp_full, two.logp_full, atol=2e-5, rtol=1e-5)


@torch.no_grad()
def generated(policy: CausalPolicy, prompt: Prompt, limit: int) -> list[int]:
    """What `transformers` generates greedily, up to and with the end token."""
    ends = sorted(policy.end_tokens)
    out = policy.model.generate(
        prompt.tokens[None],
        attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.int64),
        do_sample=False,
        max_new_tokens=limit,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,  # pad equal to end
    )
    return out[0, len(prompt.tokens) :].tolist()


# -- exact -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("engine", "name"), CASES)
def test_greedy_is_what_transformers_generates(engine, name, tiny_tokenizer):
    policy, prompts = make_policy(name, tiny_tokenizer), make_prompts()
    longest = generated(without_end(make_policy(name, tiny_tokenizer)), prompts[0], 20)
    end_with(policy, longest[6], 63)
    expected = [generated(policy, p, 20) for p in prompts]
    found = engine(policy, rows=3).generate(prompts, 2, Sampling(max_tokens=20, temperature=0), seed=0)
    assert tokens_of(found) == [[e, e] for e in expected]
    for row, tokens in zip(found, expected, strict=True):
        assert {c.finish for c in row} == {"stop" if tokens[-1] in policy.end_tokens else "length"}
    assert found[0][0].finish == "stop"
    assert int(found[0][0].tokens[-1]) in policy.end_tokens  # the end token stays: it is an action, too


@pytest.mark.parametrize(
    "sampling",
    [
        SAMPLING,
        Sampling(max_tokens=12, temperature=0.6),
        Sampling(max_tokens=12, temperature=1.4, top_p=0.8),
        Sampling(max_tokens=12, temperature=0.6, top_k=5, min_p=0.05),
    ],
    ids=str,
)
@pytest.mark.parametrize(("engine", "name"), CASES)
def test_behaviour_log_probabilities_are_those_of_training(engine, name, sampling, tiny_tokenizer):
    policy = make_policy(name, tiny_tokenizer)
    groups = rollout(engine(policy, rows=5), make_prompts(), 3, sampling, seed=1)
    batch = Batch.of(groups)
    with torch.no_grad():
        full = policy.log_likelihood(batch, temperature=sampling.temperature).logp
        plain = plain_log_likelihood(policy, batch, sampling.temperature)
    torch.testing.assert_close(batch.behaviour_logp_full, full, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(batch.behaviour_logp_full, plain, atol=2e-5, rtol=1e-5)
    if sampling.truncated:
        assert bool((batch.behaviour_logp >= batch.behaviour_logp_full - 1e-5).all())
        assert float((batch.behaviour_logp - batch.behaviour_logp_full).max()) > 0.01
        torch.testing.assert_close(batch.behaviour_logp, truncated(policy, batch, sampling), atol=2e-5, rtol=1e-5)
    else:
        assert torch.equal(batch.behaviour_logp, batch.behaviour_logp_full)


@torch.no_grad()
def truncated(policy: CausalPolicy, batch: Batch, sampling: Sampling) -> torch.Tensor:
    """Log-probabilities of the targets under the truncated distribution, by the warpers of `transformers`."""
    from transformers.generation import logits_process as warpers

    found = policy.log_likelihood(batch)
    assert found.head is not None
    assert found.hidden is not None
    none = torch.LongTensor()  # the warpers look at scores alone
    scores = warpers.TemperatureLogitsWarper(sampling.temperature)(none, found.head.logits(found.hidden))
    if sampling.top_k:
        scores = warpers.TopKLogitsWarper(sampling.top_k)(none, scores)
    if sampling.top_p < 1:
        scores = warpers.TopPLogitsWarper(sampling.top_p)(none, scores)
    if sampling.min_p:
        scores = warpers.MinPLogitsWarper(sampling.min_p)(none, scores)
    return scores.log_softmax(-1).gather(1, batch.target[:, None])[:, 0]


@pytest.mark.parametrize("name", PACKING)
def test_both_engines_draw_the_same(name, tiny_tokenizer):
    policy, prompts = make_policy(name, tiny_tokenizer), make_prompts()
    sampling = Sampling(max_tokens=15, temperature=0.9, top_p=0.95)
    embedded = EmbeddedEngine(policy, rows=5).generate(prompts, 3, sampling, seed=3)
    assert_equal(PlainEngine(policy, rows=2).generate(prompts, 3, sampling, seed=3), embedded)


# -- reproducible ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_drawn_does_not_depend_on_company(engine, tiny_tokenizer):
    policy, prompts = make_policy("llama", tiny_tokenizer), make_prompts((5, 1, 9, 3, 7))
    whole = engine(policy).generate(prompts, 4, SAMPLING, seed=5)
    assert len({len(c.tokens) for row in whole for c in row}) > 2
    for rows in (1, 3, 64):
        assert_equal(engine(policy, rows=rows).generate(prompts, 4, SAMPLING, seed=5), whole)
    assert_equal(engine(policy, rows=3).generate(prompts[::-1], 4, SAMPLING, seed=5), whole[::-1])
    assert_equal(engine(policy, rows=3).generate(prompts[3:], 4, SAMPLING, seed=5), whole[3:])
    fewer = engine(policy).generate(prompts, 2, SAMPLING, seed=5)
    assert_equal(fewer, [row[:2] for row in whole])


@pytest.mark.parametrize("engine", ENGINES)
def test_seeds_keys_and_samples_each_have_their_own_numbers(engine, tiny_tokenizer):
    policy = without_end(make_policy("llama", tiny_tokenizer))
    prompt = make_prompts((4,))[0]

    def play(seed: int = 0, keys: tuple[int, ...] = (1,), samples: int = 1):
        prompts = [Prompt(prompt.tokens, key=k) for k in keys]
        return [tuple(t) for row in tokens_of(engine(policy).generate(prompts, samples, SAMPLING, seed)) for t in row]

    assert play() == play()
    different = [play(), play(seed=1), play(seed=-1), play(keys=(2,)), play(keys=(-1,)), play(keys=(2**70 + 1,))]
    assert len({d[0] for d in different[:5]}) == 5
    assert len(set(play(samples=5))) == 5
    same_key = play(keys=(1, 1, 1), samples=2)
    assert len(set(same_key)) == 6
    assert same_key[:2] == play(samples=2)


# -- ends --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("rows", [1, 2, 64])
def test_a_single_token(engine, rows, tiny_tokenizer):
    policy, prompts = without_end(make_policy("llama", tiny_tokenizer)), make_prompts()
    found = engine(policy, rows=rows).generate(prompts, 3, Sampling(max_tokens=1), seed=0)
    longer = engine(policy, rows=rows).generate(prompts, 3, Sampling(max_tokens=4), seed=0)
    assert tokens_of(found) == [[t[:1] for t in row] for row in tokens_of(longer)]
    assert {c.finish for row in found for c in row} == {"length"}


@pytest.mark.parametrize("engine", ENGINES)
def test_every_end_token_ends_and_nothing_follows_it(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    end_with(policy, 7, 11, 13, 17, 19)
    found = engine(policy, rows=3).generate(make_prompts(), 6, Sampling(max_tokens=25, temperature=1.5), seed=0)
    for completion in (c for row in found for c in row):
        ends = [i for i, t in enumerate(completion.tokens.tolist()) if t in policy.end_tokens]
        assert ends == ([len(completion.tokens) - 1] if completion.finish == "stop" else [])
        assert completion.finish == "stop" or len(completion.tokens) == 25
    assert {c.finish for row in found for c in row} == {"stop", "length"}


@pytest.mark.parametrize("engine", ENGINES)
def test_stop_strings_end_where_they_first_appear_and_stay(engine, tiny_tokenizer):
    policy, prompts = without_end(make_policy("llama", tiny_tokenizer)), make_prompts()
    free = engine(policy).generate(prompts, 3, Sampling(max_tokens=20), seed=0)
    text = free[0][0].text
    stop = text[3:5]
    assert len(stop) == 2
    assert "�" not in stop
    found = engine(policy).generate(prompts, 3, Sampling(max_tokens=20, stop=("never there", stop)), seed=0)
    for one, whole in zip(flat(found), flat(free), strict=True):
        assert whole.tokens.tolist()[: len(one.tokens)] == one.tokens.tolist()
        if stop in whole.text:
            assert one.finish == "stop"
            assert one.text.endswith(stop)
            assert one.text.count(stop) == 1
        else:
            assert (one.finish, len(one.tokens)) == ("length", 20)
    assert found[0][0].text == text[: text.index(stop) + 2]


@pytest.mark.parametrize("engine", ENGINES)
def test_the_context_limits_completions(engine, tiny_tokenizer):
    policy = without_end(make_policy("llama", tiny_tokenizer))
    assert engine(policy).max_length == 64
    prompts = make_prompts((63, 60, 2))
    found = engine(policy, rows=2).generate(prompts, 2, Sampling(max_tokens=10), seed=0)
    assert [[len(c.tokens) for c in row] for row in found] == [[1, 1], [4, 4], [10, 10]]
    assert {c.finish for row in found for c in row} == {"length"}
    batch = Batch.of(rollout(engine(policy), prompts, 2, Sampling(max_tokens=10), seed=0))
    torch.testing.assert_close(batch.behaviour_logp, policy.log_likelihood(batch).logp.detach(), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    ("length", "samples", "message"),
    [
        (64, 1, r"prompt 10 has 64 tokens and the model's context is 64"),
        (100, 1, r"prompt 10 has 100 tokens"),
        (0, 1, r"prompt 10 is empty"),
        (3, 0, r"samples is 0"),
    ],
)
def test_requests_that_cannot_be_served(engine, length, samples, message, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    with pytest.raises(PosttrainError, match=message) as error:
        engine(policy).generate(make_prompts((length,)), samples, SAMPLING, seed=0)
    assert "\n" not in str(error.value)
    with pytest.raises(PosttrainError, match="rows is 0"):
        engine(policy, rows=0)


@pytest.mark.parametrize("engine", ENGINES)
def test_no_prompts_no_completions(engine, tiny_tokenizer):
    assert engine(make_policy("llama", tiny_tokenizer)).generate([], 2, SAMPLING, seed=0) == []


@pytest.mark.parametrize("engine", ENGINES)
def test_text_has_no_special_tokens_and_tokens_have_all(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    end_with(policy, 63)
    found = engine(policy).generate(make_prompts(), 8, Sampling(max_tokens=30, temperature=2.0), seed=0)
    members = flat(found)
    assert any(1 in c.tokens.tolist() for c in members)
    for c in members:
        assert c.text == tiny_tokenizer.decode([t for t in c.tokens.tolist() if t > 2])
        assert c.tokens.dtype == torch.int64
        assert c.logp.dtype == c.logp_full.dtype == torch.float32
        assert c.tokens.shape == c.logp.shape == c.logp_full.shape


@pytest.mark.parametrize("engine", ENGINES)
def test_progress_counts_up_to_the_end(engine, tiny_tokenizer):
    seen: list[tuple[int, int]] = []
    policy = make_policy("llama", tiny_tokenizer)
    engine(policy, rows=2).generate(make_prompts(), 3, SAMPLING, 0, lambda done, total: seen.append((done, total)))
    assert seen[-1] == (12, 12)
    assert [d for d, _ in seen] == sorted({d for d, _ in seen})
    assert {t for _, t in seen} == {12}


# -- no leaks ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_training_goes_on_after_generating(engine, name, tiny_tokenizer):
    """Steps and generations in turn on one model: gradients as without generating, and fresh weights in each one."""
    policy, other = make_policy(name, tiny_tokenizer), make_policy(name, tiny_tokenizer)
    groups = rollout(engine(other), make_prompts(), 2, SAMPLING, seed=0)
    drawn = []
    for each in (policy, other):
        optimiser = torch.optim.SGD([p for _, p in each.trainable_parameters()], lr=0.01)
        for step in range(2):
            if each is policy:
                drawn.append(engine(policy).generate(make_prompts(), 2, SAMPLING, seed=step))
            each.log_likelihood(Batch.of(groups)).logp.mean().neg().backward()
            optimiser.step()
            optimiser.zero_grad()
    for (name_, one), (_, two) in zip(policy.trainable_parameters(), other.trainable_parameters(), strict=True):
        assert torch.equal(one, two), name_
        assert not one.is_inference()
    found = engine(policy).generate(make_prompts(), 2, SAMPLING, seed=1)
    assert_equal(found, engine(other).generate(make_prompts(), 2, SAMPLING, seed=1))
    assert tokens_of(found) != tokens_of(drawn[1])  # drawn a step earlier


@pytest.mark.parametrize("engine", ENGINES)
def test_completions_are_ordinary_tensors_and_modes_are_restored(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.train()
    policy.model.model.layers[0].eval()
    modes = [m.training for m in policy.model.modules()]
    buffers = {n: b.clone() for n, b in policy.model.named_buffers()}
    (completions,) = engine(policy).generate(make_prompts((3,)), 2, SAMPLING, seed=0)
    for c in completions:
        assert not any(t.is_inference() or t.requires_grad for t in (c.tokens, c.logp, c.logp_full))
        (c.logp.clone().requires_grad_() * c.logp).sum().backward()
        c.logp += 1
    assert [m.training for m in policy.model.modules()] == modes
    assert policy.model.config._attn_implementation == "sdpa"
    assert torch.is_grad_enabled()
    assert all(p.grad is None for p in policy.model.parameters())
    for name, buffer in policy.model.named_buffers():
        assert torch.equal(buffer, buffers[name])
        assert not buffer.is_inference()


@pytest.mark.parametrize("engine", ENGINES)
def test_modes_are_restored_after_an_error(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    assert policy.packs
    policy.model.train()
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(PosttrainError, match="not finite numbers"):
        engine(policy).generate(make_prompts(), 1, SAMPLING, seed=0)
    assert all(m.training for m in policy.model.modules())
    assert policy.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("engine", ENGINES)
def test_dropout_is_off_while_sampling(engine, tiny_tokenizer):
    policy = make_policy("gpt2", tiny_tokenizer, resid_pdrop=0.5, embd_pdrop=0.5, attn_pdrop=0.5)
    expected = engine(policy).generate(make_prompts(), 2, SAMPLING, seed=0)
    policy.model.train()
    assert_equal(engine(policy).generate(make_prompts(), 2, SAMPLING, seed=0), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_adapter_takes_part(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    before = engine(policy).generate(make_prompts(), 2, SAMPLING, seed=0)
    adapted = add_lora(policy, rank=2)
    assert_equal(engine(adapted).generate(make_prompts(), 2, SAMPLING, seed=0), before)
    with torch.no_grad():
        for name, parameter in adapted.trainable_parameters():
            parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    batch = Batch.of(rollout(engine(adapted), make_prompts(), 2, SAMPLING, seed=0))
    torch.testing.assert_close(batch.behaviour_logp, adapted.log_likelihood(batch).logp.detach(), atol=2e-5, rtol=1e-5)
    found = engine(adapted).generate(make_prompts(), 2, SAMPLING, seed=0)
    assert tokens_of(found) != tokens_of(before)
    merged = CausalPolicy(adapted.merged(), tiny_tokenizer)
    assert_equal(engine(merged).generate(make_prompts(), 2, SAMPLING, seed=0), found)


@pytest.mark.parametrize("engine", ENGINES)
def test_gradient_checkpointing_does_not_disturb_sampling(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    expected = engine(policy).generate(make_prompts(), 2, SAMPLING, seed=0)
    policy.model.gradient_checkpointing_enable()
    policy.model.train()
    assert_equal(engine(policy).generate(make_prompts(), 2, SAMPLING, seed=0), expected)


@pytest.mark.parametrize("engine", ENGINES)
def test_bf16_models_sample_with_the_log_probabilities_of_training(engine, tiny_tokenizer):
    policy = make_policy("llama", tiny_tokenizer)
    policy.model.to(torch.bfloat16)
    batch = Batch.of(rollout(engine(policy), make_prompts(), 3, SAMPLING, seed=0))
    with torch.no_grad():
        error = (policy.log_likelihood(batch).logp - batch.behaviour_logp).abs()
    assert float(error.mean()) < 0.05
