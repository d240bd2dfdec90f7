"""What the commands that compress share: a method with what was set for it, text to calibrate on, what came out."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.cli.train import Given
    from posttrain.compress.calibrate import Text
    from posttrain.compress.measure import Measurement
    from posttrain.compress.method import Compression
    from posttrain.methods.registry import Entry
    from posttrain.models.causal import CausalPolicy

COMMANDS = {"quantization": "quantize", "sparsity": "prune"}


@dataclass(frozen=True)
class Asked:
    """What a command was asked for. text: to measure on; None keeps back the last tenth of what is calibrated on."""

    family: str
    model: str
    method: str
    given: Given
    calibration: str | None
    text: str | None
    samples: int | None
    length: int | None
    skip: tuple[str, ...]
    output: Path | None
    seed: int


def compress(asked: Asked) -> None:
    """Compress a model, measure it beside the float one, write its folder and tell all of it."""
    from posttrain.compress.files import reserved
    from posttrain.training.values import checked_seed

    entry = _entry(asked)
    checked_seed(asked.seed, "--seed")
    method = calibrated(made(entry, asked.given), asked.samples, asked.length)
    folder = _output(asked)
    with reserved(folder):
        _compress(asked, method, folder)


def _compress(asked: Asked, method: Compression, folder: Path) -> None:
    from posttrain.compress.files import save_somewhere
    from posttrain.compress.measure import measure
    from posttrain.compress.pipeline import check
    from posttrain.compress.policy import check_float, compressed_copy
    from posttrain.models.load import load
    from posttrain.studies.compression import texts_for
    from posttrain.terminal import Counter
    from posttrain.trajectory import PosttrainError

    source = None if asked.calibration is None else given_text("--calibration", asked.calibration)
    unseen = None if asked.text is None else given_text("--text", asked.text)
    policy = load(asked.model)
    check_float(policy)
    method = fitting(method, asked.given, policy, asked.skip)
    check(policy.base, method, asked.skip)
    texts = texts_for(policy, source, unseen)
    batches = texts.batches(policy, method.calibration, asked.seed)
    windows = texts.unseen(policy, method.calibration.length)
    with Counter(f"{method.name}: blocks", "blocks") as progress:
        small = compressed_copy(policy, method, batches, skip=asked.skip, seed=asked.seed, progress=progress)
    with Counter("measuring", "windows") as progress:
        found = measure(small, policy, windows, progress)
    written, wrong = save_somewhere(small, folder)
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    own = "" if source is not None else " (--calibration FILE for text of your own)"
    on = f"{tokens:,} tokens of {texts.calibrated_on}{own}" if method.uses_data else "no data"
    _tell(found, on, texts.measured_on, written)
    if wrong is not None:
        raise PosttrainError(f"{wrong}. The compressed model is kept in {written} instead")


# -- the method --------------------------------------------------------------------------------------------------------


def _entry(asked: Asked) -> Entry:
    """The method that was named, if it is one for this command."""
    from posttrain.methods.registry import find
    from posttrain.trajectory import PosttrainError

    entry = find(asked.method)
    if entry.kind != "compression":
        raise PosttrainError(f"--method {asked.method}: {entry.name} trains; use posttrain train MODEL {entry.name}")
    if entry.family != asked.family and entry.family in COMMANDS:
        raise PosttrainError(
            f"--method {asked.method}: {entry.name} is a method of {entry.family}; use posttrain "
            f"{COMMANDS[entry.family]}"
        )
    return entry


def made(entry: Entry, given: Given, *, shared: bool = False) -> Compression:
    """The method with what was set for it. shared: what it does not know is for other methods of the command."""
    from posttrain.recipe_text import Where
    from posttrain.recipe_values import arguments_of, mistakes_at
    from posttrain.reward.names import unknown
    from posttrain.trajectory import PosttrainError

    for key, (_, written) in given.items():
        if key not in entry.parameters and not shared:
            if written.startswith(f"--{key}"):
                raise PosttrainError(f"{written}: {entry.name} takes no {key}; it takes {_listed(entry)}")
            raise unknown(f"argument of {entry.name}", key, entry.parameters)
    where = Where("", {}, {(entry.name, key): written for key, (_, written) in given.items()})
    values = {key: value for key, (value, _) in given.items() if key in entry.parameters}
    arguments = arguments_of(entry, values, (entry.name,), where)
    with mistakes_at((entry.name,), values, where):
        found: Compression = entry.function(**arguments)
    return found


def fitting(method: Compression, given: Given, policy: CausalPolicy, skip: tuple[str, ...]) -> Compression:
    """The method with a group that divides the model's layers where none was given (see `fitted`); it says so."""
    from posttrain.methods.fitting import fitted

    method, said = fitted(method, given, policy.base, skip)
    if said is not None:
        print(f"{said} (--group)", file=sys.stderr)
    return method


def _listed(entry: Entry) -> str:
    return ", ".join(entry.parameters) or "no argument"


def calibrated(method: Compression, samples: int | None, length: int | None, option: str = "samples") -> Compression:
    """The method with another amount of calibration text, where one is given. option: what `samples` is called."""
    from posttrain.compress.method import Calibrated
    from posttrain.trajectory import PosttrainError

    for name, value in ((option, samples), ("length", length)):
        if value is not None and value < 1:
            raise PosttrainError(f"--{name} {value}: expected at least 1")
    usual = method.calibration
    return method.replace(calibration=Calibrated(samples or usual.samples, length or usual.length))


# -- the text ----------------------------------------------------------------------------------------------------------


def given_text(option: str, text: str) -> Text:
    """The text of an option; what is no such text is told before a model is loaded."""
    from posttrain.cli.inline import inline
    from posttrain.compress.calibrate import text_of
    from posttrain.trajectory import PosttrainError

    try:
        named = not text.strip() or Path(text).expanduser().exists()
        return text_of(text if named else inline(option, text))
    except PosttrainError as error:
        told = str(error)
        given = text if text.strip() else repr(text)
        raise PosttrainError(told if told.startswith(option) else f"{option} {given}: {told}") from None


# -- what came out -----------------------------------------------------------------------------------------------------


def _output(asked: Asked) -> Path:
    """Where the folder will be; one that holds something is refused before anything is computed."""
    from posttrain.trajectory import PosttrainError

    folder = asked.output or Path("runs") / f"{slug(asked.model)}-{asked.method.lower()}"
    try:
        taken = folder.exists() and (not folder.is_dir() or any(folder.iterdir()))
    except OSError:  # which is told where the folder is reserved
        taken = False
    if taken:
        raise PosttrainError(f"--output {folder}: it exists already; choose another folder")
    return folder


def slug(model: str) -> str:
    """What a folder under `runs/` calls a model."""
    return re.sub(r"[^a-zA-Z0-9.]+", "-", Path(model).name).strip("-.") or "model"


def _tell(found: Measurement, calibrated_on: str, measured_on: str, folder: Path) -> None:
    from posttrain.compress.measure import in_megabytes

    before, after = in_megabytes(found.bytes_before), in_megabytes(found.bytes_after)
    rows: list[tuple[str, Any]] = [
        ("calibrated on", calibrated_on),
        ("measured on", f"{found.tokens:,} tokens of {measured_on}"),
        ("perplexity", f"{found.perplexity_before:.4g} -> {found.perplexity:.4g}"),
        ("divergence", f"{found.kl:.4g} nats a token from the float model"),
        ("bits", f"{found.bits:.3f} a weight in {found.layers} packed layers, relative error {found.error:.3f}"),
        ("size", f"{before} -> {after} ({found.bytes_before / found.bytes_after:.1f} times smaller)"),
        ("seconds", f"{found.seconds:.1f}"),
        ("folder", folder),
    ]
    width = max(len(name) for name, _ in rows)
    for name, value in rows:
        print(f"{name:<{width}}  {value}")
