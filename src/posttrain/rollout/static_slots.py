"""Key-value memory whose shapes never change, so that a decode step can be captured once and replayed.

The counterpart of `Slots` for a GPU: room for the longest row is there from the start, places are known on the device
alone, and a step reads the first `active` rows and the first `room` tokens of each, sizes taken from a few *buckets*.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.models.attention import LayerState, TokenChoice

STEP = 128  # tokens between two sizes of room, up to eight of them; then four times as many


def rows_bucket(rows: int) -> int:
    """The least size of at least so many rows: a power of two, or one and a half of one."""
    size = 1
    while size < rows:
        middle = size + size // 2
        size = middle if size >= 32 and middle >= rows else 2 * size
    return size


def room_bucket(tokens: int) -> int:
    """The least size of at least so many tokens."""
    step = STEP if tokens <= 8 * STEP else 4 * STEP
    return -(-tokens // step) * step


class StaticSlots:
    """Keys and values of `count` rows of at most `capacity` tokens.

    keys[layer]: `[count, key heads, capacity, width]`, values[layer] likewise; positions: `[count]` int64, where the
    next token of a row goes, on the device. active, room: what the present step looks at; set before it is captured.
    """

    def __init__(self, count: int, capacity: int, device: torch.device) -> None:
        self.count, self.capacity = count, capacity
        self.keys: dict[int, Tensor] = {}
        self.values: dict[int, Tensor] = {}
        self.positions = torch.zeros(count, dtype=torch.int64, device=device)
        self._rows = torch.arange(count, device=device)
        self.active, self.room = count, capacity
        self._masks: dict[int | None, Tensor] = {}

    def admit(self, prompt: dict[int, LayerState], part: slice, slots: Tensor) -> None:
        """Fill the rows `slots` (`[copies]` int64, on the device) with the keys and values of one prompt, the tokens
        `part` of each layer's `[heads, N, width]`.
        """
        length = part.stop - part.start
        for layer, state in prompt.items():
            if state.choice is not None:
                raise NotImplementedError("tokens that are chosen by labels are decoded by growing slots")
            key, value = state.key[:, part], state.value[:, part]
            if layer not in self.keys:
                shape = (self.count, key.shape[0], self.capacity)
                self.keys[layer] = key.new_zeros(*shape, key.shape[-1])
                self.values[layer] = value.new_zeros(*shape, value.shape[-1])
            self.keys[layer][slots, :, :length] = key
            self.values[layer][slots, :, :length] = value
        self.positions[slots] = length

    def move(self, places: Tensor, to: Tensor, length: int) -> None:
        """Copy rows, `[moved]` int64 each, whose longest has `length` tokens."""
        for store in (self.keys, self.values):
            for held in store.values():
                held[to, :, :length] = held[places, :, :length]
        self.positions[to] = self.positions[places]

    def begin_step(self, active: int, room: int) -> None:
        """Look at so many rows and tokens from here on."""
        self.active, self.room = active, room
        self._masks.clear()

    def end_step(self) -> None:
        """Let go of what is made once a step."""
        self._masks.clear()

    def _mask(self, window: int | None) -> Tensor:
        """`[active, 1, 1, room]` fp32: 0 where the new token may look, -inf elsewhere; made once a step and window."""
        if window not in self._masks:
            distance = self.positions[: self.active, None] - torch.arange(self.room, device=self.positions.device)
            seen = distance >= 0 if window is None else (distance >= 0) & (distance < window)
            mask = torch.zeros(seen.shape, device=seen.device).masked_fill_(~seen, float("-inf"))
            self._masks[window] = mask[:, None, None]
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
        """See `Slots.attend`: query `[active, heads, 1, width]` to `[active, 1, heads, value width]`."""
        rows, places = self._rows[: self.active], self.positions[: self.active]
        self.keys[layer][rows, :, places] = key[:, :, 0]
        self.values[layer][rows, :, places] = value[:, :, 0]
        keys = self.keys[layer][: self.active, :, : self.room]
        values = self.values[layer][: self.active, :, : self.room]
        stacked = query.reshape(self.active, keys.shape[1], -1, query.shape[-1])
        scores = (stacked @ keys.transpose(-1, -2)).float() * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        weights = torch.softmax(scores + self._mask(window), -1).to(values.dtype)
        return (weights @ values).reshape(self.active, 1, query.shape[1], -1)
