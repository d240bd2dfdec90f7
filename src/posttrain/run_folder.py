"""The run folder: a run's memory beside its checkpoints, written so that a run killed at any instant finds its way on.

`run.json` (what the report shows), `recipe.yaml`, `stages/N-name/` (checkpoints, the stage's model), `model/`,
`evaluations/` and the JSON lines of evaluations and samples. What a killed and resumed run writes twice stands there
once: small files are replaced whole, a model folder is renamed into place when it is complete. Of several processes the
first alone writes, and the others wait where they will read.
"""

from __future__ import annotations

import hashlib
import json
import re
import shlex
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from posttrain.compress.method import Compression
from posttrain.evaluation.evaluation import Evaluation
from posttrain.evaluation.statistics import Paired
from posttrain.evaluation.task import Task
from posttrain.methods.parts import parts_of
from posttrain.methods.registry import find
from posttrain.models.causal import CausalPolicy
from posttrain.processes import here, led, same, wait
from posttrain.recipe import Recipe, StageSpec
from posttrain.recipe_compress import CompressSpec
from posttrain.reward.reward import Reward
from posttrain.training.checkpoint import sync, write_text
from posttrain.training.method import Method
from posttrain.training.track import SAMPLES, json_lines, sample_row
from posttrain.trajectory import Group, PosttrainError, Prompt

STATE, RECIPE, EVALUATIONS, LOCK = "run.json", "recipe.yaml", "evaluations.jsonl", ".lock"
FAILED = "failed: "  # what the note of a failed run starts with; it goes when the run goes on
Row = dict[str, Any]


class RunFolder:
    """What a run writes down. values: the content of `run.json`."""

    def __init__(self, path: Path, values: Row) -> None:
        self.path, self.values = path, values

    @classmethod
    def open(cls, path: Path, recipe: Recipe, *, resume: bool, command: str | None, task: Task | None) -> RunFolder:
        """Make the folder of a new run, or open the one to resume; anything else is refused and left as it is."""
        started = (path / STATE).is_file()
        if started and not resume:
            raise PosttrainError(
                f"{path} holds a run already; resume it (posttrain run --resume {shlex.quote(str(path))}) "
                f"or choose another output"
            )
        if not started and path.exists() and (not path.is_dir() or any(not _opening(p) for p in path.iterdir())):
            raise PosttrainError(f"{path} exists and is no run; choose an output that does not exist yet")
        written = plain(recipe.resolved())
        if started:
            if yaml.safe_load((path / RECIPE).read_text(encoding="utf-8")) != written:
                raise PosttrainError(f"{path} was started with another recipe than the one given; resume it as it was")
            return cls.read(path)
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise PosttrainError(
                f"cannot make the run folder {path}: {error.strerror}; choose another output"
            ) from error
        write_text(path / RECIPE, yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
        folder = cls(path, {})
        folder.save(
            name=path.name,
            created=now(),
            finished=None,
            status="running",
            seed=recipe.seed,
            command=command or "posttrain.train",
            model=recipe.model.id,
            task=task.name if task is not None else None,
            device=recipe.model.device or ("cuda" if torch.cuda.is_available() else "cpu"),
            versions={p: version(p) for p in ("posttrain", "torch", "transformers", "peft", "datasets")},
            stages=[{"index": i, **_stage_row(stage)} for i, stage in enumerate(recipe.stages)],
            only_in_python=only_in_python(recipe),
            notes=[],
        )  # fmt: skip
        return folder

    @classmethod
    def read(cls, path: Path) -> RunFolder:
        """The run folder at `path`; its files are replaced whole, so that a broken one was broken by something else."""
        try:
            values = json.loads((path / STATE).read_text(encoding="utf-8"))
            if not {"status", "stages", "notes", "only_in_python"} <= values.keys():
                raise ValueError("entries are missing")
        except (OSError, ValueError, AttributeError) as error:
            raise PosttrainError(
                f"{path / STATE} cannot be read ({error}); restore it, or start the run anew"
            ) from error
        return cls(path, values)

    def discard_if_empty(self) -> None:
        """Remove the folder of a run that has done nothing yet, so that the mended recipe may take its name."""
        if here().main and all(_opening(file) or file.name == STATE for file in self.path.iterdir()):
            shutil.rmtree(self.path)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Work on the run: its status is running, and other processes are kept off (a lock dies with its process)."""
        from filelock import FileLock, Timeout

        lock = FileLock(str(self.path / LOCK), timeout=0)

        def acquire() -> None:
            try:
                lock.acquire()
            except Timeout:
                raise PosttrainError(
                    f"{self.path} is in use by another process; wait for that run or stop it"
                ) from None

        led(acquire)
        try:
            self.values = self.read(self.path).values
            wait()
            if self.values["status"] != "finished":
                self.save(status="running", notes=[n for n in self.values["notes"] if not n.startswith(FAILED)])
            yield
        finally:
            lock.release()

    # -- run.json ----------------------------------------------------------------------------------------------------

    def save(self, **changes: Any) -> None:
        """Change entries of `run.json`."""
        self.values |= changes
        if here().main:
            write_text(self.path / STATE, json.dumps(self.values, indent=1))

    def note(self, *notes: str) -> None:
        """Add what a reader of the report must know, each note once."""
        fresh = [n for n in dict.fromkeys(notes) if n not in self.values["notes"]]
        if fresh:
            self.save(notes=[*self.values["notes"], *fresh])

    # -- models ------------------------------------------------------------------------------------------------------

    def starts_from(self, policy: CausalPolicy) -> None:
        """Write down which weights the run starts from, or refuse others: its reference would be another model."""
        found = _fingerprint(policy)
        if self.values.get("start", found) != found:
            raise PosttrainError(
                f"{self.path} did not start from these weights of {policy.name} (trained since, or in another "
                f"precision?); load the model anew to resume"
            )
        self.save(start=found)

    @property
    def model(self) -> Path:
        return self.path / "model"

    def stage(self, i: int) -> Path:
        return self.path / "stages" / f"{i}-{self.values['stages'][i]['name']}"

    def stage_model(self, i: int) -> Path:
        """Where the model of a stage goes; the last one's is the run's."""
        return self.model if i == len(self.values["stages"]) - 1 else self.stage(i) / "model"

    def stages_done(self) -> int:
        """The last stage whose model is complete, or -1."""
        done = max((i for i in range(len(self.values["stages"])) if self.stage_model(i).is_dir()), default=-1)
        same(done, f"the stages they see in {self.path}, which they must share")
        return done

    def save_model(self, policy: CausalPolicy, stage: int) -> None:
        """Save under another name, then rename: a model folder that exists is complete."""
        led(lambda: self._save_model(policy, stage))

    def _save_model(self, policy: CausalPolicy, stage: int) -> None:
        target = self.stage_model(stage)
        scratch = target.with_name(f".{target.name}-writing")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            policy.save(scratch)
            for file in (*scratch.iterdir(), scratch):
                sync(file)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise PosttrainError(f"cannot save the model to {target}: {error}; free some space and resume") from error
        scratch.rename(target)
        sync(target.parent)

    # -- evaluations -------------------------------------------------------------------------------------------------

    def evaluation(self, stage: int) -> Evaluation | None:
        """The held-out evaluation after a stage (-1: before the first), where there is one."""
        file = self._evaluation_file(stage)
        return Evaluation.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None

    def add_evaluation(self, found: Evaluation, stage: int, label: str, seconds: float) -> None:
        """Write an evaluation down: a line, its completions as samples, and last the whole of it."""
        record = {
            "label": label, "stage": stage, "step": 0, "task": found.task,
            "accuracy": found.accuracy.value, "low": found.accuracy.low, "high": found.accuracy.high,
            "n": found.n, "samples": found.samples, "length": found.mean_tokens,
            "pass_at_k": {str(k): {"value": e.value, "low": e.low, "high": e.high}
                          for k, e in found.pass_at_k.items() if k > 1},
            "seconds": round(seconds, 2),
        }  # fmt: skip
        if here().main:
            self._put(SAMPLES, _samples(found, stage, label), lambda row: (row["split"], row["name"], row["stage"]))
            self._put(EVALUATIONS, [record], lambda row: (row["label"], row.get("stage")))
            self._evaluation_file(stage).parent.mkdir(exist_ok=True)
            write_text(self._evaluation_file(stage), found.to_json())
        wait()

    def add_comparison(self, paired: Paired) -> None:
        record = {"label": "comparison", "difference": paired.difference, "low": paired.low, "high": paired.high,
                  "p": paired.pvalue, "n": paired.n}  # fmt: skip
        if here().main:
            self._put(EVALUATIONS, [record], lambda row: row["label"])

    def _evaluation_file(self, stage: int) -> Path:
        return self.path / "evaluations" / ("before.json" if stage < 0 else f"{stage}.json")

    def _put(self, name: str, rows: list[Row], identity: Callable[[Row], Any]) -> None:
        """Add rows to a file of JSON lines in place of those of the same identity that a killed process wrote."""
        file = self.path / name
        fresh = {identity(row) for row in rows}
        kept = [line for line, row in json_lines(file) if identity(row) not in fresh] if file.is_file() else []
        write_text(file, "".join([*kept, *(json.dumps(r, ensure_ascii=False) + "\n" for r in rows)]))


def _stage_row(stage: StageSpec | CompressSpec) -> Row:
    """What `run.json` says of a stage before it begins."""
    name = stage.method.name
    if isinstance(stage, CompressSpec):
        return {"name": name, "method": name, "kind": "compression", "steps": None}
    kind = "online" if stage.method.online else "offline"
    return {"name": name, "method": name, "kind": kind, "steps": stage.method.settings.steps}


def _fingerprint(policy: CausalPolicy) -> str:
    """A digest of up to a thousand entries of every parameter."""
    digest = hashlib.blake2b(digest_size=16)
    for name, parameter in policy.model.named_parameters():
        some = parameter.detach().flatten()[:: max(1, parameter.numel() // 1000)]
        digest.update(name.encode() + some.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _opening(file: Path) -> bool:
    """Whether a file is what a run leaves that was killed before its `run.json` was there."""
    return file.name in (RECIPE, LOCK) or file.name.startswith((f".{RECIPE}.", f".{STATE}."))


def _samples(found: Evaluation, stage: int, label: str) -> list[Row]:
    rows = []
    for i in range(found.n):
        group = Group([], Prompt(torch.empty(0), text=found.questions[i], answer=found.answers[i]))
        for j in range(found.samples):
            parts = {name: float(part[i, j]) for name, part in found.parts.items()}
            finish = "stop" if found.stopped[i, j] else "length"
            rows.append(
                sample_row(max(stage, 0), label, 0 if stage < 0 else 1 << 30, "heldout", group,
                           found.completions[i][j], float(found.values[i, j]), parts, finish)
            )  # fmt: skip
    return rows


def now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def plain(value: Any) -> Any:
    """What YAML gives back after writing: tuples as lists, paths as text, functions by their import path."""
    return yaml.safe_load(json.dumps(value, default=_named))


def _named(value: Any) -> Any:
    """A Python object in a recipe, the same in every process: an import path, a reward's parts, its text."""
    if isinstance(value, Reward):
        return value.weights
    if hasattr(value, "__qualname__"):
        return f"{value.__module__}:{value.__qualname__}"
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


def only_in_python(recipe: Recipe) -> list[str]:
    """What of a recipe YAML cannot hold: objects and functions that were handed over in Python."""
    found = [] if recipe.task is None or isinstance(recipe.task, str | Mapping) else ["the task"]
    for stage in recipe.stages:
        name, arguments = stage.method.name, _arguments(stage)
        if isinstance(stage, StageSpec) and stage.reward is not None and plain(stage.reward) != stage.reward:
            found.append(f"the reward of {name}")
        try:
            known = _from_catalogue(stage)
        except PosttrainError:
            found.append(f"the method {name}")
            continue
        if parts_of(known) != parts_of(stage.method):  # as text: partial functions never equal each other
            found.append(f"the method {name}, changed")
        found += [f"the argument {key} of {name}" for key, value in arguments.items() if not _in_yaml(value)]
    return found


def _arguments(stage: StageSpec | CompressSpec) -> dict[str, Any]:
    """What the recipe gives the stage's function, or that of the pipeline it belongs to."""
    origin = stage.origin if isinstance(stage, StageSpec) else None
    return stage.method.arguments if origin is None else origin.arguments


def _from_catalogue(stage: StageSpec | CompressSpec) -> Method | Compression:
    """The stage's method as its arguments make it, calibrated on as much as the stage says."""
    if isinstance(stage, StageSpec) and stage.origin is not None:
        return stage.origin.method
    made: Method | Compression = find(stage.method.name).function(**stage.method.arguments)
    if isinstance(stage, CompressSpec) and isinstance(made, Compression):
        return made.replace(calibration=stage.method.calibration)
    return made


def _in_yaml(value: Any) -> bool:
    """Whether YAML can hold a method's argument: plain values, and paths as text."""
    try:
        json.dumps(value, default=lambda inner: str(inner) if isinstance(inner, Path) else json.dumps(inner))
    except TypeError:
        return False
    return True
