"""The planner: what a method needs on a device, and the setting that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from posttrain.plan.device import Device, show_bytes
from posttrain.plan.ledger import PARTS, SPREAD, Part, Peak
from posttrain.plan.rehearsal import Lengths, Rehearsal, rehearse
from posttrain.training.method import Method

USABLE = 0.9  # of a device's memory: allocators leave gaps, and other processes live there too
EFFICIENCY = 0.42  # of the throughput of large matrix products: a step is 2.4 times the roofline (benchmarks/)
ADAM_BYTES = 30  # read and written a trained parameter by an update: master, moments, gradient, and the bf16 copy
RANK = 16  # of an adapter that a plan proposes
FEW_ROWS = 16  # completions decoded at once, where memory is short


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to run the method: settings in place of those asked for, and over how many devices its state is sharded.

    needs: bytes on each device, the process included. seconds: of a step, by phase.
    """

    changes: dict[str, Any]
    shards: int
    rehearsal: Rehearsal
    needs: float
    seconds: dict[str, float]

    def words(self) -> str:
        """`token_budget 512, checkpointing`; `as asked` where nothing is changed."""
        said = [name if value is True else f"{name} {value}" for name, value in self.changes.items()]
        if self.shards > 1:
            said.append(f"weights spread over {self.shards} devices (--shard)")
        return ", ".join(said) or "as asked"


@dataclass(frozen=True, slots=True)
class Plan:
    """What was asked, what it needs, and what fits.

    asked: the setting asked for. fits: the first of those tried that fits, None where none does. tried: all that were.
    gpus_needed: where none fits, how many such devices would hold the state in shards, None where no number would.
    """

    model: str
    method: str
    device: Device
    gpus: int
    lengths: Lengths
    asked: Setting
    fits: Setting | None
    tried: tuple[Setting, ...] = ()
    gpus_needed: int | None = None

    @property
    def shown(self) -> Setting:
        """The setting that the table is about: the one that fits, else the one that needs least."""
        return self.fits or min(self.tried, key=lambda s: s.needs)

    def rows(self) -> list[tuple[str, str, str]]:
        """The table: each part at the peak, with what it is."""
        setting = self.shown
        rows: list[tuple[str, str, str]] = []
        if self.device.process:
            what = "Python and libraries" if self.device.kind == "cpu" else "the driver's context and libraries"
            rows.append(("process", show_bytes(self.device.process), what))
        parts = setting.rehearsal.peak.parts
        rows += [(name, show_bytes(parts[name]), what) for name, what in PARTS.items() if parts.get(name, 0) >= 1024]
        rows.append(("peak", show_bytes(setting.needs), f"of {show_bytes(self.device.memory)}, {setting.words()}"))
        rows += [
            (f"  in {name}", show_bytes(self.device.process + peak.bytes), _passing(peak))
            for name, peak in setting.rehearsal.phases.items()
            if peak.bytes
        ]
        rows += [
            (f"seconds: {name}", f"{seconds:.3g}", _time_words(name, setting.rehearsal))
            for name, seconds in setting.seconds.items()
            if seconds
        ]
        rows.append(
            ("seconds a step", f"{sum(setting.seconds.values()):.3g}", f"at {EFFICIENCY:.0%} of peak throughput")
        )
        return rows

    def sentence(self) -> str:
        """What comes out, in plain words."""
        what = f"{self.method} on {self.model}"
        where = f"{self.gpus} × {self.device.name}" if self.device.kind != "cpu" else self.device.name
        memory = show_bytes(self.device.memory)
        asked = show_bytes(self.asked.needs)
        if self.fits is self.asked:
            return f"{what} fits as asked: {asked} of {memory} on {where}, about {_seconds(self.asked)} a step."
        if self.fits is not None:
            return (
                f"{what} needs {asked} as asked and has {memory} on {where}; it fits with {self.fits.words()}: "
                f"{show_bytes(self.fits.needs)}, about {_seconds(self.fits)} a step."
            )
        least = self.shown
        said = (
            f"{what} needs {asked} as asked and {show_bytes(least.needs)} at least ({least.words()}); it does not fit "
            f"{memory} on {where}."
        )
        if self.gpus_needed is not None:
            return f"{said} It would fit {self.gpus_needed} such devices (--shard, {_small_words(self.tried)})."
        return f"{said} It needs a device of {show_bytes(least.needs / USABLE)}, a smaller model or shorter sequences."

    def json(self) -> dict[str, Any]:
        """All of it, for other programs: bytes, seconds, operations."""
        return {
            "model": self.model,
            "method": self.method,
            "device": {name: getattr(self.device, name) for name in Device.__slots__},
            "gpus": self.gpus,
            "prompt": self.lengths.prompt,
            "completion": self.lengths.completion,
            "fits": self.fits is not None,
            "sentence": self.sentence(),
            "asked": _setting_json(self.asked),
            "setting": _setting_json(self.shown),
            "tried": [{"setting": s.words(), "bytes": s.needs} for s in self.tried],
            "gpus_needed": self.gpus_needed,
        }


@dataclass
class Planner:
    """Plans of one method on one model and device; rehearsals that are the same are made once."""

    config: Any
    method: Method
    lengths: Lengths
    device: Device
    dtype: torch.dtype
    gpus: int = 1
    name: str = ""
    efficiency: float = EFFICIENCY
    _made: dict[tuple[Any, ...], Setting] = field(default_factory=dict)

    def plan(self) -> Plan:
        """Try settings from the one asked for to the thriftiest until one fits."""
        asked, tried = self.setting({}, 1), list[Setting]()
        fits: Setting | None = None
        for changes, shards in self._ladder():
            setting = self.setting(changes, shards)
            if setting not in tried:
                tried.append(setting)
            if self._fits(setting):
                fits = setting
                break
        needed = None if fits is not None or self.device.kind == "cpu" else self._gpus_needed()
        return Plan(
            self.name, self.method.name, self.device, self.gpus, self.lengths, asked, fits, tuple(tried), needed
        )

    def setting(self, changes: dict[str, Any], shards: int, gpus: int | None = None) -> Setting:
        """The method with some settings changed, rehearsed and timed."""
        gpus = gpus or self.gpus
        key = (*sorted(changes.items()), shards, gpus)
        if key not in self._made:
            made = rehearse(
                self.config, self.method.with_settings(**changes), self.lengths, self.dtype,
                device=self.device.kind, gpus=gpus, shards=shards, name=self.name,
            )  # fmt: skip
            needs = self.device.process + made.peak.bytes
            self._made[key] = Setting(changes, shards, made, needs, self._seconds(made, shards))
        return self._made[key]

    def _fits(self, setting: Setting) -> bool:
        return setting.needs <= USABLE * self.device.memory

    def _ladder(self) -> Iterator[tuple[dict[str, Any], int]]:
        """Settings to try, what costs nothing first, what changes the result (an adapter) last."""
        settings = self.method.settings
        yield {}, 1
        small: dict[str, Any] = {}
        if settings.token_budget > (longest := self._longest_unit()):
            small = {"token_budget": longest}
            yield small, 1
        if self.gpus > 1:
            yield {}, self.gpus
            yield small, self.gpus
        if not settings.checkpointing:
            small = {**small, "checkpointing": True}
            yield small, self.gpus
        if self.method.online and settings.rollout_rows > FEW_ROWS:
            small = {**small, "rollout_rows": FEW_ROWS}
            yield small, self.gpus
        if not settings.lora and self.method.reference_decay is None and self.method.reference_every is None:
            yield {**small, "lora": RANK}, self.gpus

    def _longest_unit(self) -> int:
        """Model tokens of the smallest micro-batch there is: one sequence, or one group that must stay together."""
        members = {"prompts": self.method.settings.group, "preferences": 2}.get(self.method.data, 1)
        whole = self.method.objective.keep_groups
        return self.lengths.prompt + self.lengths.completion * (members if whole else 1)

    def _gpus_needed(self) -> int | None:
        """How many devices hold the state in shards, with micro-batches as small as they go; None if no number does."""
        small = {name: value for name, value in [*self._ladder()][-1][0].items() if name != "lora"}
        gpus = 2 * max(1, self.gpus)
        for _ in range(12):
            setting = self.setting(small, gpus, gpus)
            if self._fits(setting):
                return gpus
            parts = setting.rehearsal.peak.parts
            rest = setting.needs - sum(size for part, size in parts.items() if part in SPREAD)
            if rest > USABLE * self.device.memory:
                return None
            gpus *= 2
        return None

    def _seconds(self, made: Rehearsal, shards: int) -> dict[str, float]:
        """Time of each phase: the work at the rate that steps reach, or the reading of memory where that is more."""
        rate, bandwidth = self.device.throughput * self.efficiency, self.device.bandwidth
        settings = self.method.settings
        seconds = {name: work / rate for name, work in made.work.items()}
        if self.method.online:
            reading = made.waves * self.lengths.completion * made.decode_bytes / bandwidth
            seconds["rollout"] = max(seconds["rollout"], reading)
        seconds["optimizer"] = settings.updates * settings.minibatches * made.trained * ADAM_BYTES / bandwidth / shards
        return seconds


def _passing(peak: Peak) -> str:
    """What a phase holds beside the state: `cache 96 MiB, vocabulary 12 MiB`."""
    passing: tuple[Part, ...] = ("cache", "activations", "vocabulary", "workspace")
    return ", ".join(f"{name} {show_bytes(peak.parts[name])}" for name in passing if peak.parts.get(name))


def _seconds(setting: Setting) -> str:
    total = sum(setting.seconds.values())
    return f"{total:.1f} s" if total >= 1 else f"{1000 * total:.0f} ms"


def _small_words(tried: tuple[Setting, ...]) -> str:
    """The thriftiest setting without an adapter."""
    changes = [s.changes for s in tried if "lora" not in s.changes][-1]
    return ", ".join(name if value is True else f"{name} {value}" for name, value in changes.items()) or "as asked"


def _time_words(name: str, made: Rehearsal) -> str:
    return {
        "rollout": f"{made.sequences} completions, {made.rows} at a time",
        "signals": "passes without gradient",
        "update": f"{made.micros} micro-batches of {made.micro_tokens} tokens",
        "optimizer": f"{made.trained / 1e6:.1f} million trained parameters",
    }[name]


def _setting_json(setting: Setting) -> dict[str, Any]:
    made = setting.rehearsal
    return {
        "words": setting.words(),
        "changes": setting.changes,
        "shards": setting.shards,
        "bytes": setting.needs,
        "parts": made.peak.parts,
        "phases": {name: {"bytes": peak.bytes, "parts": peak.parts} for name, peak in made.phases.items()},
        "seconds": setting.seconds,
        "work": made.work,
        "parameters": made.parameters,
        "trained": made.trained,
        "rows": made.rows,
        "micro_batches": made.micros,
    }
