"""Double Sparsity: a decode step attends to few tokens, found by a few channels of their keys.

Nothing of the cache is dropped; what is sparse is what is read of it. Which channels tell the tokens of large scores
apart hardly changes in a head, so they are chosen once, on calibration text. A prompt is read whole.

Reference: Post-training sparse attention with Double Sparsity, 2024, arXiv 2408.07092 (card 146).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from posttrain.compress.attention_part import AttentionPart
from posttrain.compress.calls import Batch
from posttrain.compress.token_labels import FULL, PACKED, packed, rounded, unpacked
from posttrain.models.attention import attend, attention_configs, implementation
from posttrain.native import chosen as native
from posttrain.native import library
from posttrain.trajectory import PosttrainError

NAME, WATCHING = "posttrain-double-sparsity", "posttrain-channels"
Statistic = Literal["qk", "q", "k", "random"]
STATISTICS = ("qk", "q", "k", "random")


@dataclass(frozen=True)
class SparseAttention(AttentionPart):
    """Chooses channels on calibration text, and lets every layer but the first ones attend by them.

    tokens: k, that a decode step attends to. factor: g; r = width / g channels are labels. label_bits: labels are
    rounded to so many (16: not at all). statistic: by what channels are chosen. dense: layers from the first on that
    stay as they are. recent: tokens, of the k, that are always the newest.
    """

    tokens: int = 128
    factor: int = 4
    label_bits: int = 4
    statistic: Statistic = "qk"
    dense: int = 2
    recent: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 1 or not 0 <= self.recent <= self.tokens:
            raise PosttrainError(
                f"tokens is {self.tokens}, of which {self.recent} are the newest; expected at least 1, and no more "
                f"newest ones"
            )
        if self.factor < 1 or self.dense < 0:
            raise PosttrainError(f"factor is {self.factor} and dense {self.dense}; expected from 1 and from 0")
        if not (1 <= self.label_bits <= 8 or self.label_bits == FULL):
            raise PosttrainError(f"label_bits is {self.label_bits}; expected 1 to 8, or 16 to leave labels as they are")
        if self.statistic not in STATISTICS:
            raise PosttrainError(f"statistic is {self.statistic!r}; expected one of {', '.join(STATISTICS)}")

    @property
    def uses_data(self) -> bool:
        return self.statistic != "random"

    def apply_to_model(self, model: nn.Module, batches: Sequence[Batch], seed: int = 0) -> None:
        """Give the attention modules of a model their choice of tokens, and the model the function that heeds it."""
        found = importances(model, batches, self.statistic, seed)
        for module, importance in found[self.dense :]:
            count = importance.shape[1] // self.factor
            if not count:
                raise PosttrainError(
                    f"factor is {self.factor} and heads are {importance.shape[1]} wide; expected a factor of at most "
                    f"their width"
                )
            channels = importance.topk(count, -1).indices.sort(-1).values
            module.token_choice = ChosenTokens.of(channels, self.tokens, self.label_bits, self.recent)
        heed(model)


class ChosenTokens(nn.Module):
    """The choice of tokens of one layer (`TokenChoice`).

    channels: `[heads, r]` int16, those of the keys that are labels, for each query head. tokens, label_bits, recent:
    see `SparseAttention`.
    """

    channels: Tensor

    def __init__(self, heads: int, count: int, tokens: int, label_bits: int, recent: int) -> None:
        super().__init__()
        self.tokens, self.label_bits, self.recent = tokens, label_bits, recent
        self.register_buffer("channels", torch.zeros(heads, count, dtype=torch.int16))

    @classmethod
    def of(cls, channels: Tensor, tokens: int, label_bits: int = FULL, recent: int = 0) -> ChosenTokens:
        made = cls(channels.shape[0], channels.shape[1], tokens, label_bits, recent)
        made.channels.copy_(channels)
        return made

    def settings(self) -> dict[str, int]:
        """JSON values: the arguments of the constructor."""
        heads, count = self.channels.shape
        return {"heads": heads, "count": count, "tokens": self.tokens, "label_bits": self.label_bits,
                "recent": self.recent}  # fmt: skip

    def labels(self, key: Tensor) -> Tensor:
        """See `TokenChoice`: the keys' channels of each query head, packed where the function in C reads them so."""
        rows, kv, length, _ = key.shape
        heads, count = self.channels.shape
        place = self.channels.long().view(1, kv, heads // kv, 1, count).expand(rows, -1, -1, length, -1)
        found = key[:, :, None].expand(-1, -1, heads // kv, -1, -1).gather(-1, place)
        keep = packed if self.label_bits <= PACKED and library.there_for(key) else rounded
        return keep(found.reshape(rows, heads, length, count), self.label_bits)

    def query_labels(self, query: Tensor) -> Tensor:
        """`[rows, heads, Q, width]` to `[rows, heads, Q, r]`."""
        place = self.channels.long()[None, :, None].expand(query.shape[0], -1, query.shape[2], -1)
        return rounded(query.gather(-1, place), self.label_bits)

    def pick(self, query: Tensor, labels: Tensor, visible: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens of largest scores by labels: places `[rows, heads, Q, k]`, and whether each may be seen at all.

        visible: `[rows, 1, Q, K]` bool.
        """
        own = self.query_labels(query)
        if labels.dtype == torch.int32:
            own, labels = own.float(), unpacked(labels, own.shape[-1])
        scores = (own @ labels.transpose(-1, -2)).float()
        if self.recent:
            newest = visible & (visible.flip(-1).cumsum(-1).flip(-1) <= self.recent)
            scores = scores.masked_fill(newest, torch.inf)
        top = scores.masked_fill(~visible, -torch.inf).topk(min(self.tokens, labels.shape[2]), -1, sorted=False)
        return top.indices, top.values > -torch.inf

    def within(self, query: Tensor, key: Tensor, mask: Tensor) -> Tensor:
        """See `TokenChoice`: every query is treated as a decode step's."""
        if key.shape[2] <= self.tokens:
            return mask
        places, seen = self.pick(query, self.labels(key), mask)
        chosen = torch.zeros(*query.shape[:3], key.shape[2], dtype=torch.bool, device=key.device)
        return chosen.scatter_(-1, places, seen)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, labels: Tensor, visible: Tensor, scale: float,
        softcap: float | None = None,
    ) -> Tensor:  # fmt: skip
        """See `TokenChoice`: exact attention to the chosen tokens, with no correction for what is left out."""
        rows, kv, room, _ = key.shape
        if room <= self.tokens:
            return attend(query, key, value, visible, scale, softcap)
        if softcap is None and native.suits(query, key, value, labels):
            return native.attend(
                query, key, value, labels, self.channels, self.label_bits, visible, self.tokens, self.recent, scale
            )
        heads = query.shape[1]
        places, seen = self.pick(query, labels, visible)
        first = torch.arange(rows * kv, device=key.device).repeat_interleave(heads // kv).view(rows, heads, 1) * room
        flat = (places[:, :, 0] + first).flatten()
        keys = key.reshape(rows * kv * room, -1).index_select(0, flat).view(rows, heads, -1, key.shape[-1])
        values = value.reshape(rows * kv * room, -1).index_select(0, flat).view(rows, heads, -1, value.shape[-1])
        scores = (query @ keys.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        return scores.masked_fill(~seen, -torch.inf).softmax(-1).to(values.dtype) @ values


# -- which channels ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def importances(
    model: nn.Module, batches: Sequence[Batch], statistic: Statistic = "qk", seed: int = 0
) -> list[tuple[Any, Tensor]]:
    """Every attention module in the order in which they run, with `[heads, width]` how much each channel counts.

    `qk`: the mean over tokens of |q_c k_c|, each token's query with its own key, as positions have turned them. `q`,
    `k`: of |q_c|, of |k_c|, as positions have turned them too, since that is what labels are made of (the authors' are
    taken before). `random`: drawn by seed.
    """
    from transformers import AttentionInterface

    found: dict[int, tuple[nn.Module, Tensor, int]] = {}

    def watch(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
    ) -> tuple[Tensor, None]:
        q, k = query.float(), key.float().repeat_interleave(query.shape[1] // key.shape[1], 1)
        told = {"qk": (q * k).abs(), "q": q.abs(), "k": k.abs(), "random": k[:, :, :1]}[statistic]
        _, before, count = found.get(id(module), (module, 0.0, 0))
        found[id(module)] = (module, before + told.sum((0, 2)), count + told.shape[0] * told.shape[2])
        return _attended(module, query, key, value, attention_mask, options), None

    AttentionInterface.register(WATCHING, watch)
    with implementation(attention_configs(model), WATCHING):
        for batch in batches:
            model(**{**batch, "use_cache": False})
    if not found:
        raise PosttrainError(
            f"{type(model).__name__} attends in a way of its own; expected a model that uses the attention interface "
            f"of transformers"
        )
    draw = torch.Generator().manual_seed(seed)
    return [
        (module, torch.rand(total.shape, generator=draw) if statistic == "random" else total / count)
        for module, total, count in found.values()
    ]


# -- as a function of `transformers` models ---------------------------------------------------------------------------


def heed(model: nn.Module) -> None:
    """Let a model's layers attend as their choice of tokens says, with the caches of `transformers` too."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, sparse_forward)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for config in attention_configs(model):
        config._attn_implementation = NAME


def sparse_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    """A decode step (one query, several keys) is sparse, all else dense. Labels are taken from the cached keys anew:
    the tokens are those of the embedded engine, which keeps labels, and only there less is read.
    """
    decoding = query.shape[2] == 1 and key.shape[2] > 1
    choice = getattr(module, "token_choice", None) if decoding else None
    return _attended(module, query, key, value, attention_mask, options, choice), None


def _attended(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, options: dict[str, Any],
    choice: Any = None,
) -> Tensor:  # fmt: skip
    """`[rows, Q, heads, width]`: attention to the tokens that `choice` takes, to all of them without one."""
    if any(options.get(name) is not None for name in ("s_aux", "position_bias")):
        raise PosttrainError("attention sinks and position biases are not known here; double sparsity has neither")
    scaling, softcap = options.get("scaling"), options.get("softcap")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    visible = _visible(module, query, key, mask, options)
    if choice is None:
        found = attend(query, key, value, visible, scale, softcap)
    else:
        found = choice.attend(query, key, value, choice.labels(key), visible, scale, softcap)
    return found.transpose(1, 2).contiguous()


def _visible(
    module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None, options: dict[str, Any]
) -> Tensor:  # fmt: skip
    """`[rows, 1, Q, K]` bool. Without a mask, a causal layer looks back from its last tokens, within its window."""
    rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
    if mask is not None:
        mask = mask[..., :keys]
        return (mask if mask.dtype == torch.bool else mask == 0).expand(rows, -1, -1, -1)
    seen = torch.ones(queries, keys, dtype=torch.bool, device=key.device)
    causal = options.get("is_causal")
    if getattr(module, "is_causal", True) if causal is None else causal:
        seen = seen.tril(keys - queries)
        if options.get("sliding_window"):
            seen = seen.triu(keys - queries + 1 - int(options["sliding_window"]))
    return seen.expand(rows, 1, -1, -1)
