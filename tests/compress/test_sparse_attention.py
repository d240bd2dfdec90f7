"""Double Sparsity: dense attention where nothing is left out, and the choice against a computation of its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import make_tokenizer
from posttrain import load, methods
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.compress.sparse_attention import ChosenTokens, SparseAttention, importances
from posttrain.models.attention import attend
from posttrain.models.causal import CausalPolicy
from posttrain.objective.batch import Batch
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.rollout.plain import PlainEngine
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling, Trajectory
from tiny_models import VOCABULARY, make_policy

pytestmark = pytest.mark.limit("double-sparsity")


def tokens(count: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed))


def batches() -> list[dict[str, Tensor]]:
    return [{"input_ids": torch.stack([tokens(24, s) for s in range(4)])}]


def sparse(policy: CausalPolicy, **options: Any) -> CompressedPolicy:
    return compressed_copy(policy, methods.double_sparsity(**{"dense": 0, "label_bits": 16, **options}), batches())


def of_text(text: Tensor, prompt: int = 1) -> Batch:
    return Batch.of([Group([Trajectory(text, torch.arange(len(text)) >= prompt)])])


def decoded(policy: CausalPolicy, prompt: Tensor, length: int, engine: type = EmbeddedEngine) -> Any:
    return engine(policy).generate([Prompt(prompt)], 2, Sampling(max_tokens=length), seed=0)[0]


# -- the limits of card 146 --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt", "gpt-neox", "gemma2", "mistral"])
@pytest.mark.parametrize("label_bits", [16, 2])
def test_with_all_tokens_it_is_dense_attention(name: str, label_bits: int) -> None:
    """(a): k >= S, whatever the labels are: likelihood of texts, decoding by either cache."""
    policy = make_policy(name, make_tokenizer())
    small = sparse(policy, tokens=64, factor=4, label_bits=label_bits)
    text = of_text(tokens(30))
    torch.testing.assert_close(small.log_likelihood(text).logp, policy.log_likelihood(text).logp, atol=1e-5, rtol=1e-5)
    for engine in (EmbeddedEngine, PlainEngine):
        for found, wanted in zip(
            decoded(small, tokens(9), 12, engine), decoded(policy, tokens(9), 12, engine), strict=True
        ):
            assert torch.equal(found.tokens, wanted.tokens)
            torch.testing.assert_close(found.logp_full, wanted.logp_full, atol=1e-5, rtol=1e-5)


def test_with_all_channels_the_tokens_are_those_of_largest_scores() -> None:
    """(b): r = d."""
    draw = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 8, generator=draw)
    key, value = torch.randn(2, 2, 2, 20, 8, generator=draw)
    visible = (torch.arange(20) < torch.tensor([[20], [13]]))[:, None, None]
    choice = ChosenTokens.of(torch.arange(8).expand(4, 8), 5)
    found = choice.attend(query, key, value, choice.labels(key), visible, 0.3)
    for row in range(2):
        for head in range(4):
            k, v = key[row, head // 2], value[row, head // 2]
            scores = (k @ query[row, head, 0]).masked_fill(~visible[row, 0, 0], -torch.inf)
            best = scores.topk(5).indices
            expected = (0.3 * scores[best]).softmax(-1) @ v[best]
            torch.testing.assert_close(found[row, head, 0], expected)


def test_tokens_are_chosen_by_the_channels_of_each_query_head() -> None:
    # two heads on one key head: head 0 looks at channel 1, head 1 at channel 0
    choice = ChosenTokens.of(torch.tensor([[1], [0]]), 1)
    key = torch.tensor([[[[5.0, 0.0], [0.0, 5.0], [1.0, 1.0]]]])
    value = torch.tensor([[[[1.0], [2.0], [3.0]]]])
    query = torch.ones(1, 2, 1, 2)
    found = choice.attend(query, key, value, choice.labels(key), torch.ones(1, 1, 1, 3, dtype=torch.bool), 1.0)
    assert found.flatten().tolist() == [2.0, 1.0]


@pytest.mark.parametrize("name", ["llama", "opt", "mistral", "gemma2"])  # whose scores have a cap
@pytest.mark.parametrize("options", [{}, {"label_bits": 2}, {"label_bits": 8}, {"recent": 2}, {"dense": 1}])
def test_decoding_is_the_masked_computation_of_the_whole_text(name: str, options: dict[str, int]) -> None:
    """(c), token by token, from a prompt of one token, so that all that follows is decoded; with both caches."""
    policy = make_policy(name, make_tokenizer())
    small = sparse(policy, tokens=3, factor=4, **options)  # the window of Mistral is 4
    dense_too = policy.log_likelihood(of_text(tokens(30))).logp
    assert (small.log_likelihood(of_text(tokens(30))).logp - dense_too).abs().max() > 1e-3  # something is left out
    for engine in (EmbeddedEngine, PlainEngine):
        for found in decoded(small, tokens(1), 20, engine):
            text = torch.cat([tokens(1), found.tokens])
            expected = small.log_likelihood(of_text(text)).logp
            torch.testing.assert_close(found.logp_full, expected, atol=1e-5, rtol=1e-5)


def test_both_caches_agree_behind_a_prompt_that_is_read_whole() -> None:
    small = sparse(make_policy("llama", make_tokenizer()), tokens=4)
    for one, other in zip(decoded(small, tokens(15), 12), decoded(small, tokens(15), 12, PlainEngine), strict=True):
        assert torch.equal(one.tokens, other.tokens)
        torch.testing.assert_close(one.logp_full, other.logp_full, atol=1e-5, rtol=1e-5)


# -- parts -------------------------------------------------------------------------------------------------------------


def test_the_newest_tokens_are_among_the_chosen() -> None:
    choice = ChosenTokens.of(torch.zeros(1, 1), 3, recent=2)
    labels = torch.tensor([[[[9.0], [8.0], [0.0], [1.0], [7.0]]]])
    visible = torch.tensor([True, True, True, True, False])[None, None, None]
    places, seen = choice.pick(torch.ones(1, 1, 1, 1), labels, visible)
    assert sorted(places.flatten().tolist()) == [0, 2, 3]
    assert seen.all()


def test_fewer_tokens_than_asked_for_are_no_zeros() -> None:
    """Of rows shorter than k, the empty slots of the cache are never attended to."""
    choice = ChosenTokens.of(torch.zeros(2, 1), 4)
    key, value = torch.ones(1, 2, 8, 4), torch.randn(1, 2, 8, 4, generator=torch.Generator().manual_seed(0))
    visible = (torch.arange(8) < 3)[None, None, None]
    found = choice.attend(torch.ones(1, 2, 1, 4), key, value, choice.labels(key), visible, 1.0)
    torch.testing.assert_close(found[:, :, 0], value[:, :, :3].mean(2))
    torch.testing.assert_close(found, attend(torch.ones(1, 2, 1, 4), key, value, visible, 1.0))


def test_channels_are_those_whose_products_are_largest() -> None:
    """Against queries and keys that the layer's own projections give, in a model without positions in them (OPT)."""
    policy = make_policy("opt", None)
    found = importances(policy.model, batches())
    assert len(found) == 2
    module, importance = found[0]
    states: list[Tensor] = []
    hook = module.register_forward_pre_hook(
        lambda m, given, keywords: states.append(given[0] if given else keywords["hidden_states"]), with_kwargs=True
    )
    with torch.no_grad():
        policy.model(**batches()[0])
        hook.remove()
        q, k = (getattr(module, f"{n}_proj")(states[0]).flatten(0, 1).view(-1, 4, 8) for n in ("q", "k"))
        shares = importance / (q * k).abs().mean(0)  # OPT scales its queries once
    torch.testing.assert_close(shares, shares[0, 0].expand(4, 8), atol=1e-5, rtol=1e-4)
    small = sparse(policy, factor=2, dense=1)
    modules = [m for m in small.model.modules() if isinstance(m, ChosenTokens)]
    assert len(modules) == 1  # the first layer is dense
    expected = found[1][1].topk(4, -1).indices.sort(-1).values
    assert torch.equal(modules[0].channels.long(), expected)


def test_calibration_leaves_no_trace() -> None:
    policy = make_policy("llama", None)
    before = policy.model.config._attn_implementation
    importances(policy.model, batches())
    assert policy.model.config._attn_implementation == before


def test_a_folder_decodes_as_the_model_that_it_was(tmp_path: Path) -> None:
    policy = make_policy("llama", make_tokenizer())
    small = sparse(policy, tokens=4, factor=4, label_bits=4, recent=1)
    assert (small.compression.bits, small.compression.layers) == (32.0, [])
    small.save(tmp_path / "small")
    again = load(str(tmp_path / "small"), precision="fp32")
    assert isinstance(again, CompressedPolicy)
    text = of_text(tokens(30))
    assert torch.equal(again.log_likelihood(text).logp, small.log_likelihood(text).logp)
    for one, other in zip(decoded(again, tokens(9), 12), decoded(small, tokens(9), 12), strict=True):
        assert torch.equal(one.tokens, other.tokens)


def test_it_goes_with_packed_weights() -> None:
    policy = make_policy("llama", make_tokenizer())
    method = methods.rtn(bits=8, group=8).replace(attention=SparseAttention(4, 2, 16, dense=0))
    small = compressed_copy(policy, method, batches())
    assert len(small.compression.layers) == 14
    assert sum(isinstance(m, ChosenTokens) for m in small.model.modules()) == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": 0}, r"^tokens is 0, of which 0 are the newest; expected at least 1"),
        ({"tokens": 4, "recent": 5}, r"^tokens is 4, of which 5 are the newest"),
        ({"factor": 0}, r"^factor is 0 and dense 2; expected from 1"),
        ({"label_bits": 12}, r"^label_bits is 12; expected 1 to 8, or 16"),
        ({"statistic": "kq"}, r"^statistic is 'kq'; expected one of qk, q, k, random"),
    ],
)
def test_mistakes_are_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(PosttrainError, match=told):
        SparseAttention(**options)


def test_a_factor_that_leaves_no_channel_and_a_model_that_attends_in_its_own_way() -> None:
    with pytest.raises(PosttrainError, match=r"^factor is 9 and heads are 8 wide"):
        sparse(make_policy("llama", None), factor=9)
    with pytest.raises(PosttrainError, match="attends in a way of its own; expected a model that uses the attention"):
        sparse(make_policy("mamba", None))
