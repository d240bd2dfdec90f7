"""What every method of a comparison may spend: time, tokens or rollouts."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from posttrain.training.duration import in_seconds
from posttrain.training.method import Method
from posttrain.trajectory import PosttrainError

Unit = Literal["seconds", "tokens", "rollouts"]
EXAMPLES = "a time such as 90s, 5m or 1h, or a number such as 2Mtokens or 5000rollouts"
FACTORS = {"": 1, "k": 1_000, "m": 1_000_000, "g": 1_000_000_000}
SETTINGS: dict[Unit, str] = {"seconds": "budget", "tokens": "token_limit", "rollouts": "rollout_limit"}


@dataclass(frozen=True, slots=True)
class Budget:
    """amount: seconds of training (without measuring), tokens trained on, or completions sampled in training."""

    amount: float
    unit: Unit

    @classmethod
    def parse(cls, text: str | float) -> Budget:
        """Of `90` (seconds), `90s`, `5m`, `1h`, `2Mtokens`, `500k tokens`, `5000rollouts`; Raises PosttrainError."""
        found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([kmg]?)\s*(tokens|rollouts)\s*", str(text), re.IGNORECASE)
        if found:
            unit: Unit = "tokens" if found[3].lower() == "tokens" else "rollouts"
            budget = cls(float(math.floor(float(found[1]) * FACTORS[found[2].lower()])), unit)
        else:
            seconds = in_seconds(str(text))
            if seconds is None:
                raise PosttrainError(f"budget is {text!r}; expected {EXAMPLES}")
            budget = cls(seconds, "seconds")
        if not budget.amount > 0:
            raise PosttrainError(f"budget is {text!r}; expected more than nothing: {EXAMPLES}")
        return budget

    def __str__(self) -> str:
        """`5m`, `90s`, `2Mtokens`, `5000rollouts`: what `parse` reads."""
        if self.unit == "seconds":
            for size, letter in ((3600, "h"), (60, "m")):
                if self.amount >= size and self.amount % size == 0:
                    return f"{self.amount / size:g}{letter}"
            return f"{self.amount:g}s"
        for size, letter in ((1_000_000, "M"), (1_000, "k")):
            if self.amount >= 10 * size and self.amount % size == 0:
                return f"{self.amount / size:g}{letter}{self.unit}"
        return f"{self.amount:.0f}{self.unit}"

    def limit(self, method: Method, steps: int | None) -> Method:
        """The method within this budget; steps: its length as far as that matters to schedules, None to keep its own.

        Other limits of the method's settings give way.
        """
        limits: dict[str, object] = dict.fromkeys(SETTINGS.values())
        limits[SETTINGS[self.unit]] = self.amount if self.unit == "seconds" else max(1, int(self.amount))
        if steps is not None:
            limits |= {"steps": steps, "epochs": None}
        return method.with_settings(**limits)

    def part(self, count: int) -> Budget:
        """An equal part for each of `count` stages."""
        return Budget(self.amount / count, self.unit)
