"""Key-value memory for decoding: preallocated slots, one a running completion."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.models.attention import LayerState, TokenChoice
from posttrain.native import library, softmax
from posttrain.native import slots as native_slots

GROWTH = 32  # tokens by which the slots grow


class Slots:
    """Keys and values of up to `count` running rows in every layer; running rows always occupy the first slots.

    keys[layer]: `[count, key heads, room, width]`, values[layer] likewise; labels[layer]: `[count, heads, room, label
    width]`, where tokens are chosen by labels; length: `[count]` tokens held by a row.
    room grows with the longest row, in steps up to `capacity`: running rows are then one contiguous block, which the
    products of a decode step read without copying it first.
    """

    def __init__(self, count: int, capacity: int) -> None:
        self.count, self.capacity = count, capacity
        self.room = 0
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.labels: dict[int, Tensor] = {}
        self.length = torch.zeros(count, dtype=torch.int64)
        self.active = 0
        self._rows = torch.arange(count)
        self._seen: dict[int | None, Tensor] = {}
        self._masks: dict[int | None, Tensor] = {}

    def admit(self, prompt: dict[int, LayerState], part: slice, copies: int) -> int:
        """Start `copies` rows with the keys and values of one prompt, the tokens `part` of each layer's `[heads, N,
        width]`; returns the first row.
        """
        first = self.active
        self._grow(part.stop - part.start + 1)
        for layer, state in prompt.items():
            key, value = state.key[:, part], state.value[:, part]
            if layer not in self.keys:
                shape = (self.count, key.shape[0], self.room, key.shape[-1])
                self.keys[layer] = key.new_zeros(shape)
                self.values[layer] = value.new_zeros((*shape[:3], value.shape[-1]))
            self.keys[layer][first : first + copies, :, : key.shape[1]] = key
            self.values[layer][first : first + copies, :, : value.shape[1]] = value
            if state.choice is not None:
                label = state.choice.labels(key[None])[0]
                if layer not in self.labels:
                    self.labels[layer] = label.new_zeros(self.count, label.shape[0], self.room, label.shape[-1])
                self.labels[layer][first : first + copies, :, : label.shape[1]] = label
        self.length[first : first + copies] = part.stop - part.start
        self.active += copies
        return first

    def _grow(self, tokens: int) -> None:
        """Make room for rows of `tokens` tokens."""
        if tokens <= self.room:
            return
        before, self.room = self.room, min(self.capacity, -(-tokens // GROWTH) * GROWTH)
        for store in (self.keys, self.values, self.labels):
            for layer, held in store.items():
                grown = held.new_zeros(*held.shape[:2], self.room, held.shape[-1])
                grown[: self.active, :, :before] = held[: self.active]
                store[layer] = grown

    def compact(self, keep: Tensor) -> None:
        """Keep the running rows `keep` (`[kept]` ascending), moving rows from the end into the gaps."""
        kept = len(keep)
        stays = keep[keep < kept]
        moves = keep[keep >= kept]
        gaps = torch.ones(kept, dtype=torch.bool)
        gaps[stays] = False
        holes = gaps.nonzero()[:, 0]
        if len(moves):
            top = int(self.length[moves].max())
            for store in (self.keys, self.values, self.labels):
                for layer in store:
                    store[layer][holes, :, :top] = store[layer][moves, :, :top]
            self.length[holes] = self.length[moves]
        self.active = kept

    @staticmethod
    def order(keep: Tensor) -> Tensor:
        """Which old row stands in each slot after `compact(keep)`: `[kept]`."""
        kept = len(keep)
        result = torch.arange(kept)
        gaps = torch.ones(kept, dtype=torch.bool)
        gaps[keep[keep < kept]] = False
        result[gaps] = keep[keep >= kept]
        return result

    def begin_step(self) -> Tensor:
        """Prepare a decode step of all running rows; returns the position of each one's new token, `[active]`."""
        positions = self.length[: self.active].clone()
        self._grow(int(positions.max()) + 1)
        self._seen.clear()
        self._masks.clear()
        self._positions = positions.to(next(iter(self.keys.values())).device)
        self.length[: self.active] += 1
        return positions

    def _visible(self, window: int | None) -> Tensor:
        """`[active, 1, 1, keys]` bool: where the new token may look; made once a step and window."""
        if window not in self._seen:
            distance = self._positions[:, None] - torch.arange(self.room, device=self._positions.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            self._seen[window] = seen[:, None, None]
        return self._seen[window]

    def _mask(self, window: int | None) -> Tensor:
        """The same in fp32: 0 where the new token may look, -inf elsewhere."""
        if window not in self._masks:
            seen = self._visible(window)
            self._masks[window] = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
        return self._masks[window]

    def attend(
        self,
        layer: int,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float,
        *,
        window: int | None = None,
        softcap: float | None = None,
        choice: TokenChoice | None = None,
    ) -> Tensor:
        """Write the new keys and values, attend to those of the row (its last `window` ones): query
        `[active, heads, 1, width]` to `[active, 1, heads, value width]`. The heads of a group are rows of one product,
        so keys are never repeated.
        """
        rows = self._rows[: self.active]
        store_k, store_v = self.keys[layer], self.values[layer]
        if softcap is None and choice is None and native_slots.suits(query, key, value, store_k, store_v):
            return native_slots.attend(query, key, value, store_k, store_v, self._positions, scale, window)
        store_k[rows, :, self._positions] = key[:, :, 0]
        store_v[rows, :, self._positions] = value[:, :, 0]
        keys, values = store_k[: self.active], store_v[: self.active]
        if choice is not None:
            self.labels[layer][rows, :, self._positions] = choice.labels(key)[:, :, 0]
            labels, visible = self.labels[layer][: self.active], self._visible(window)
            return choice.attend(query, keys, values, labels, visible, scale, softcap).transpose(1, 2)
        stacked = query.reshape(len(rows), keys.shape[1], -1, query.shape[-1])
        products = stacked @ keys.transpose(-1, -2)
        if softcap is None and library.there_for(products, values):
            by_head = products.view(len(rows), query.shape[1], 1, -1)
            weights = softmax.attention_weights(by_head, self._visible(window), scale).view(products.shape)
            return (weights @ values).reshape(len(rows), 1, query.shape[1], -1)
        scores = products.float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores + self._mask(window), -1).to(values.dtype)
        return (weights @ values).reshape(len(rows), 1, query.shape[1], -1)
