"""The usual arm of compression: a lab model compressed by a method, and measured beside the float one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from posttrain.compress.calibrate import Text, Texts, streams, whole_sequences
from posttrain.compress.calls import Batch
from posttrain.compress.measure import mean_error
from posttrain.compress.method import Calibrated, Compression
from posttrain.compress.policy import CompressedPolicy, compressed_copy
from posttrain.evaluation.perplexity import predict
from posttrain.lab import text
from posttrain.lab.models import ModelSpec
from posttrain.lab.presets import PRESETS
from posttrain.models.causal import CausalPolicy
from posttrain.studies.arms import heldout_figures
from posttrain.studies.study import Arm, Measured
from posttrain.trajectory import Group

MODELS = 3  # seeds of the lab model; building one takes about a minute and a half, once
FLOAT_BITS = 32.0
QUICK: dict[str, int] = {"models": 1, "samples": 8, "rows": 8, "problems": 8}

Prepare = Callable[[CausalPolicy, int], CausalPolicy]
Extra = Callable[[CompressedPolicy, CausalPolicy], dict[str, float]]


def compressed(
    method: Compression,
    *,
    model: str = "mixed",
    models: int = MODELS,
    samples: int = 128,
    rows: int = 200,
    problems: int = 200,
    skip: tuple[str, ...] = (),
    prepare: Prepare | None = None,
    extra: Extra | None = None,
    depends: tuple[object, ...] = (),
) -> Arm:
    """An arm that compresses the preset's model by `method`, in fp32, and measures it beside the model as it was.

    Compression is deterministic given the model and its calibration, so both follow the seed: seed s takes the lab
    model built from seed `s % models`, and calibrates on text of that model's worlds drawn by s. Arms of one seed share
    model, calibration and what they are measured on, so their differences are paired. With more seeds than `models`
    some share a model: then an interval speaks less of other models than of other calibration texts.

    Figures: `perplexity` on text from beyond the held-out border, `float_perplexity` of the model as it was, `kl` (from
    its distribution to the compressed one's, mean nats a token of that text), `accuracy` (greedy, on held-out
    problems), `bits` (stored bits a packed weight, everything counted), `error` (relative Frobenius error of a layer's
    weights, mean over layers), `seconds` (of the compression), and what `extra` adds. In text, the tokens that count
    are those that the model was trained to predict: in `mixed` all of a page but its first line, else the solutions.

    Args:
        model: a preset of the lab, with or without `lab:` before it. `mixed` is made for this: a language model of
            pages of 128 tokens in whose calibration all rows are equally long. models: how many seeds of it.
        samples: rows of calibration text. rows: of held-out text. problems: held-out problems. The method's own
            `calibration` is for other models.
        skip: patterns of layers that stay float, beside the method's.
        prepare: a module-level function of the float policy and the seed that gives the policy to compress (outliers,
            other norms, ...), which then counts as the float one.
        extra: a module-level function of the compressed policy and the float one.
    """
    return _arm(method, model, models, samples, rows, problems, skip, prepare, extra, depends)


def uncompressed(
    *,
    model: str = "mixed",
    models: int = MODELS,
    rows: int = 200,
    problems: int = 200,
    prepare: Prepare | None = None,
    depends: tuple[object, ...] = (),
) -> Arm:
    """The float model as an arm, with the same figures: what `compressed` starts from."""
    return _arm(None, model, models, 0, rows, problems, (), prepare, None, depends)


def _arm(
    method: Compression | None, model: str, models: int, samples: int, rows: int, problems: int, skip: tuple[str, ...],
    prepare: Prepare | None, extra: Extra | None, depends: tuple[object, ...],
) -> Arm:  # fmt: skip
    from posttrain import lab

    preset = model.removeprefix("lab:")
    arguments = {
        "method": method, "preset": preset, "model": lab.preset(preset).key, "models": models, "samples": samples,
        "rows": rows, "problems": problems, "skip": skip, "prepare": prepare, "extra": extra,
    }  # fmt: skip
    return Arm(run_compressed, arguments, depends)


def run_compressed(
    seed: int,
    quick: bool,
    *,
    method: Compression | None,
    preset: str,
    models: int,
    samples: int,
    rows: int,
    problems: int,
    skip: tuple[str, ...],
    prepare: Prepare | None,
    extra: Extra | None,
    model: str = "",
) -> Measured:
    """See `compressed`; `model` is the preset's key in the lab."""
    from posttrain import lab

    if quick:
        models, samples, rows, problems = (QUICK[k] for k in ("models", "samples", "rows", "problems"))
    policy = lab.model(preset, seed % models)
    if prepare is not None:
        policy = prepare(policy, seed)
    spec = lab.preset(preset)
    unseen, task = text.heldout(spec, rows), lab.task(preset)
    if method is None:
        found = predict(policy, unseen)
        figures = {"perplexity": found.perplexity, "kl": 0.0, "bits": FLOAT_BITS, "error": 0.0, "seconds": 0.0}
        small: CausalPolicy = policy
        float_perplexity, seconds, tokens = found.perplexity, 0.0, 0
    else:
        batches = whole_sequences(text.fresh(spec, samples, seed))
        small = compressed_copy(policy, method, batches, skip=skip, seed=seed)
        done = small.compression
        found = predict(small, unseen, of=policy)
        assert found.other is not None
        figures = {
            "perplexity": found.perplexity,
            "kl": found.divergence,
            "bits": done.bits,
            "error": mean_error(small),
            "seconds": done.seconds,
        }
        float_perplexity, seconds = found.other.perplexity, done.seconds
        tokens = sum(batch["input_ids"].numel() for batch in batches)
        if extra is not None:
            figures |= extra(small, policy)
    figures["float_perplexity"] = float_perplexity
    figures["accuracy"] = heldout_figures(small, task, samples=1, ks=(1,), prompts=problems)["accuracy"]
    return Measured(figures, seconds=seconds, tokens=tokens)


@dataclass(frozen=True)
class LabText:
    """What a lab model was trained on, drawn anew, and the same from beyond the held-out border (`Texts`)."""

    spec: ModelSpec
    rows: int = 200

    @property
    def calibrated_on(self) -> str:
        return f"text of the worlds of {self.spec.name}"

    @property
    def measured_on(self) -> str:
        return "the same from beyond the held-out border"

    def batches(self, policy: CausalPolicy, much: Calibrated, seed: int) -> list[Batch]:
        """`samples` whole rows; they are as long as they are."""
        return whole_sequences(text.fresh(self.spec, much.samples, seed))

    def unseen(self, policy: CausalPolicy, length: int) -> list[Group]:
        return text.heldout(self.spec, self.rows)


def texts_for(policy: CausalPolicy, source: Text | None = None, measured: Text | None = None) -> Texts:
    """What a policy is calibrated on and measured on: as given, else what the lab makes.

    That is for a model of the lab what it was trained on, and for any other problems of many worlds with their
    solutions as plain text.
    """
    name, _, _ = policy.name.removeprefix("lab:").partition("@")
    if source is None and measured is None and policy.name.startswith("lab:") and name in PRESETS:
        return LabText(PRESETS[name])
    if source is None:
        return streams(policy, text.plain(), measured, "problems of the lab with their solutions")
    return streams(policy, source, measured)
