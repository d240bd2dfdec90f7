"""A run: model, stages, evaluations before and after, and the folder that holds all of it.

The folder is the run's memory. Killed at any moment and run again with `resume`, it goes on from the newest checkpoint
and ends in the same weights as a run that was never killed.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from posttrain.data.dataset import Dataset, load_dataset
from posttrain.evaluate.evaluate import evaluate
from posttrain.evaluate.evaluation import Evaluation, compare
from posttrain.evaluate.task import Task
from posttrain.evaluate.tasks import task_from
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.recipe import Recipe, StageSpec
from posttrain.report import build
from posttrain.reward.reward import reward_from
from posttrain.rollout.embedded import EmbeddedEngine
from posttrain.train.checkpoint import write_text
from posttrain.train.collect import Offline, Online, Source
from posttrain.train.loop import Trainer
from posttrain.train.scoring import heldout_loss, sequence_scores
from posttrain.train.track import SAMPLES, Tracker, sample_row
from posttrain.trajectory import Group, PosttrainError, Prompt, Sampling

Say = Callable[[str], None]


class Interrupted(PosttrainError):
    """The run was stopped by a signal and left a checkpoint; the message says how to go on."""


@dataclass
class Run:
    """A finished run. model: the trained policy; before and after: held-out evaluations (None without a task)."""

    folder: Path
    model: CausalPolicy
    report: Path
    before: Evaluation | None = None
    after: Evaluation | None = None

    def summary(self) -> str:
        """One line: held-out accuracy before and after with intervals, or where the model is."""
        if self.after is None:
            return f"trained model: {self.folder / 'model'}"
        if self.before is None:
            return f"held-out accuracy: {self.after.accuracy} (n={self.after.n})"
        return f"held-out accuracy: {self.before.accuracy} -> {self.after.accuracy} (n={self.after.n})"


@dataclass
class _State:
    """`run.json`: what the report shows and what resuming needs."""

    path: Path
    values: dict[str, Any] = field(default_factory=dict)

    def save(self, **changes: Any) -> None:
        self.values |= changes
        write_text(self.path, json.dumps(self.values, indent=1))


def execute(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    resume: bool = False,
    show: bool = True,
    command: str | None = None,
    policy: CausalPolicy | None = None,
) -> Run:
    """Carry out a recipe.

    Args:
        folder: the run folder; by default the recipe's `output`, else a new one under `runs/`.
        resume: go on with the run in `folder` where it stopped (or return it if it is finished).
        show: progress on standard error.
        policy: a model that is already loaded, in place of the recipe's.
    Raises:
        PosttrainError: anything a user can mend; Interrupted after Ctrl-C.
    """
    folder = folder or recipe.output or _fresh_folder(recipe)
    say: Say = (lambda text: print(text, file=sys.stderr, flush=True)) if show else (lambda text: None)
    task = task_from(recipe.task) if recipe.task is not None else None
    state = _open(folder, recipe, resume, command, task)
    try:
        with _stop_on_signal(say) as stop:
            return _Execution(recipe, folder, state, task, say, show, stop).all(policy)
    except Interrupted:
        state.save(status="interrupted")
        build(folder)
        raise
    except BaseException as error:
        state.save(status="failed", notes=[*state.values["notes"], f"failed: {error}"])
        raise


def _fresh_folder(recipe: Recipe) -> Path:
    name = "-".join(stage.method.name for stage in recipe.stages)
    stamp = datetime.now().strftime("%Y%m%d-%H%M%S")
    return Path("runs") / f"{name}-{stamp}"


def _open(folder: Path, recipe: Recipe, resume: bool, command: str | None, task: Task | None) -> _State:
    """Make the run folder, or open the one to resume."""
    state = _State(folder / "run.json")
    if state.path.is_file():
        if not resume:
            raise PosttrainError(
                f"{folder} holds a run already; resume it (posttrain run --resume {folder}) or choose another output"
            )
        state.values = json.loads(state.path.read_text())
        kept = yaml.safe_load((folder / "recipe.yaml").read_text())
        if kept != _plain(recipe.resolved()):
            raise PosttrainError(f"{folder} was started with another recipe than the one given; resume it without one")
        return state
    if folder.exists() and any(folder.iterdir()):
        raise PosttrainError(f"{folder} exists and is no run; choose an output that does not exist yet")
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "recipe.yaml", yaml.safe_dump(_plain(recipe.resolved()), sort_keys=False, allow_unicode=True))
    state.save(
        name=folder.name,
        created=_now(),
        finished=None,
        status="running",
        seed=recipe.seed,
        command=command or "posttrain.train",
        model=recipe.model.id,
        task=task.name if task is not None else None,
        device=recipe.model.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        versions={p: version(p) for p in ("posttrain", "torch", "transformers", "peft", "datasets")},
        stages=[
            {"index": i, "name": s.method.name, "method": s.method.name,
             "kind": "online" if s.method.online else "offline", "steps": s.method.settings.steps}
            for i, s in enumerate(recipe.stages)
        ],
        notes=[],
    )  # fmt: skip
    return state


class _Execution:
    """The stages of a run, one after the other."""

    def __init__(
        self, recipe: Recipe, folder: Path, state: _State, task: Task | None, say: Say, show: bool,
        stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.recipe, self.folder, self.state, self.task = recipe, folder, state, task
        self.say, self.show, self.stop = say, show, stop

    def all(self, policy: CausalPolicy | None) -> Run:
        last = len(self.recipe.stages) - 1
        final = self.folder / "model"
        done = last if final.is_dir() else max((i for i in range(last) if self._stage_model(i).is_dir()), default=-1)
        policy = self._policy(done, final, policy)
        if done < 0:
            self._evaluate(policy, -1, "before", self.recipe.evaluate.before)
        for i in range(done + 1, last + 1):
            policy = self._stage(i, policy)
            self._save_model(policy, final if i == last else self._stage_model(i))
            shutil.rmtree(self._stage_folder(i) / "checkpoints", ignore_errors=True)
            self._evaluate(policy, i, f"after {self.recipe.stages[i].method.name}", True)
        self._evaluate(policy, last, f"after {self.recipe.stages[last].method.name}", True)
        before, after = self._load_evaluation(-1), self._load_evaluation(last)
        self._compare(before, after)
        if self.state.values["finished"] is None:
            self.state.save(finished=_now())
        self.state.save(status="finished")
        return Run(self.folder, policy, build(self.folder), before, after)

    # -- models ------------------------------------------------------------------------------------------------------

    def _policy(self, done: int, final: Path, given: CausalPolicy | None) -> CausalPolicy:
        """The policy as the last finished stage left it."""
        spec = self.recipe.model
        if done < 0:
            if given is not None:
                return given
            self.say(f"loading {spec.id}")
            return load(**{("model" if k == "id" else k): v for k, v in spec.model_dump().items()})
        where = final if final.is_dir() else self._stage_model(done)
        found = load(where, precision=spec.precision, device=spec.device, trust_remote_code=spec.trust_remote_code)
        found.name = spec.id
        return found

    def _stage_folder(self, i: int) -> Path:
        return self.folder / "stages" / f"{i}-{self.recipe.stages[i].method.name}"

    def _stage_model(self, i: int) -> Path:
        return self._stage_folder(i) / "model"

    def _save_model(self, policy: CausalPolicy, target: Path) -> None:
        """Save under another name, then rename: a model folder that exists is complete."""
        scratch = target.with_name(f".{target.name}-writing")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            policy.save(scratch)
        except OSError as error:
            shutil.rmtree(scratch, ignore_errors=True)
            raise PosttrainError(f"cannot save the model to {target}: {error}; free some space and resume") from error
        scratch.rename(target)

    # -- stages ------------------------------------------------------------------------------------------------------

    def _stage(self, i: int, policy: CausalPolicy) -> CausalPolicy:
        """Train one stage; adapters are merged at its end."""
        stage = self.recipe.stages[i]
        settings = stage.method.settings
        torch.manual_seed(self.recipe.seed * 1_000 + i)
        if settings.lora:
            policy = add_lora(policy, rank=settings.lora, seed=self.recipe.seed)
        else:
            policy.model.requires_grad_(True)
        source, heldout = self._source(i, stage, policy)
        total = settings.total_steps(source.rows)
        self.state.values["stages"][i]["steps"] = total
        self.state.save()
        tracker = Tracker(self.folder, i, stage.method.name, total, show=self.show)
        with tracker:
            trainer = Trainer(
                policy,
                stage.method,
                source,
                folder=self._stage_folder(i) / "checkpoints",
                seed=self.recipe.seed,
                tracker=tracker,
                evaluator=self._evaluator(policy, stage, heldout),
                stop=self.stop,
            )
            before = heldout_loss(trainer, heldout) if heldout and trainer.progress.step == 0 else None
            outcome = trainer.run()
        if outcome.status == "interrupted":
            raise Interrupted(
                f"stopped at step {outcome.progress.step} of {total} of {stage.method.name}; the checkpoint is kept: "
                f"go on with: posttrain run --resume {self.folder}"
            )
        notes = list(tracker.notes)
        if heldout:
            notes.append(f"{stage.method.name}: held-out loss {before:.4f} -> {heldout_loss(trainer, heldout):.4f}")
        if isinstance(source, Online) and any(source.reward.errors.values()):
            failed = ", ".join(f"{name} {count}" for name, count in source.reward.errors.items() if count)
            notes.append(f"{stage.method.name}: rewards that raised: {failed}; the first: {source.reward.first_error}")
        self._note(*notes)
        if not policy.adapted:
            return policy
        merged = CausalPolicy(policy.merged(), policy.tokenizer, policy.name)
        merged._packs = policy._packs
        return merged

    def _source(self, i: int, stage: StageSpec, policy: CausalPolicy) -> tuple[Source, list[Group]]:
        """Where the stage's groups come from, and held-out rows of its data."""
        method, settings = stage.method, stage.method.settings
        rows, heldout = self._rows(stage, policy)
        if not rows:
            raise PosttrainError(f"{method.name}: no row to train on")
        sampler = method.sampler(len(rows), self.recipe.seed + i)
        if not method.online:
            return Offline([r for r in rows if isinstance(r, Group)], sampler, settings), heldout
        prompts = [r for r in rows if isinstance(r, Prompt)]
        if stage.reward is not None:
            reward = reward_from(stage.reward)
        else:
            assert self.task is not None
            reward = self.task.reward
        engine = EmbeddedEngine(policy, rows=settings.rollout_rows)
        return Online(prompts, sampler, settings, engine, reward, self.recipe.seed * 1_000 + i), heldout

    def _rows(self, stage: StageSpec, policy: CausalPolicy) -> tuple[list[Group | Prompt], list[Group]]:
        method, limit = stage.method, stage.method.settings.rows
        if stage.data is None:
            assert self.task is not None
            if method.online:
                return list(self.task.prompts(policy.tokenizer, "train", limit)), []
            return list(self.task.demonstrations(policy.tokenizer, limit)), []
        options = stage.data.model_dump(exclude={"heldout"})
        options["kind"] = options["kind"] or method.data
        options["max_length"] = options["max_length"] or policy.max_length
        data: Dataset = load_dataset(options.pop("source"), policy.tokenizer, limit=limit, **options)
        if data.kind != method.data:
            raise PosttrainError(f"{method.name} learns from {method.data}; {data.name} holds {data.kind}")
        self._note(data.summary())
        held = int(stage.data.heldout if stage.data.heldout >= 1 else stage.data.heldout * len(data))
        items = list(data)
        if held and method.online:
            raise PosttrainError(f"{method.name}: heldout applies to offline data; give a task to evaluate on")
        return items[: len(items) - held], [g for g in items[len(items) - held :] if isinstance(g, Group)]

    # -- evaluation --------------------------------------------------------------------------------------------------

    def _evaluator(
        self, policy: CausalPolicy, stage: StageSpec, heldout: list[Group]
    ) -> Callable[[Trainer], dict[str, float]] | None:
        if self.task is not None:
            limit = stage.method.settings.evaluate_limit
            return lambda trainer: {"heldout_accuracy": self._measure(policy, limit, samples=1).accuracy.value}
        if heldout:
            return lambda trainer: {"heldout_loss": heldout_loss(trainer, heldout)}
        return None

    def _measure(self, policy: CausalPolicy, limit: int | None, samples: int, show: bool = False) -> Evaluation:
        assert self.task is not None
        spec = self.recipe.evaluate
        temperature = spec.temperature if spec.temperature is not None else (0.0 if samples == 1 else 1.0)
        return evaluate(
            EmbeddedEngine(policy),
            policy.tokenizer,
            self.task,
            samples=samples,
            sampling=Sampling(spec.max_tokens, temperature),
            limit=limit,
            ks=tuple(k for k in spec.k if k <= samples),
            seed=self.recipe.seed,
            likelihood=lambda trajectories: sequence_scores(policy, trajectories),
        )

    def _evaluate(self, policy: CausalPolicy, stage: int, label: str, wanted: bool) -> None:
        """Evaluate on the held-out prompts once, and write it down."""
        file = self._evaluation_file(stage)
        if self.task is None or not wanted or file.is_file():
            return
        begun = time.perf_counter()
        found = self._measure(policy, self.recipe.evaluate.holdout, self.recipe.evaluate.samples)
        record = {
            "label": label, "stage": stage, "step": 0, "task": self.task.name,
            "accuracy": found.accuracy.value, "low": found.accuracy.low, "high": found.accuracy.high,
            "n": found.n, "samples": found.samples, "length": found.mean_tokens,
            "pass_at_k": {str(k): {"value": e.value, "low": e.low, "high": e.high}
                          for k, e in found.pass_at_k.items() if k > 1},
            "seconds": round(time.perf_counter() - begun, 2),
        }  # fmt: skip
        self._append("evaluations.jsonl", [record])
        self._append(SAMPLES, _samples(found, stage, label))
        file.parent.mkdir(exist_ok=True)
        write_text(file, found.to_json())
        self.say(f"{label}: {found.summary()} in {record['seconds']:.0f} s")

    def _evaluation_file(self, stage: int) -> Path:
        return self.folder / "evaluations" / ("before.json" if stage < 0 else f"{stage}.json")

    def _load_evaluation(self, stage: int) -> Evaluation | None:
        file = self._evaluation_file(stage)
        return Evaluation.from_json(file.read_text(encoding="utf-8")) if file.is_file() else None

    def _compare(self, before: Evaluation | None, after: Evaluation | None) -> None:
        if before is None or after is None or self.state.values["status"] == "finished":
            return
        paired = compare(before, after)
        record = {"label": "comparison", "difference": paired.difference, "low": paired.low, "high": paired.high,
                  "p": paired.pvalue, "n": paired.n}  # fmt: skip
        self._append("evaluations.jsonl", [record])

    # -- files -------------------------------------------------------------------------------------------------------

    def _append(self, name: str, records: list[dict[str, Any]]) -> None:
        with (self.folder / name).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(r, ensure_ascii=False) + "\n" for r in records)

    def _note(self, *notes: str) -> None:
        fresh = [n for n in notes if n not in self.state.values["notes"]]
        if fresh:
            self.state.save(notes=[*self.state.values["notes"], *fresh])


def _samples(found: Evaluation, stage: int, label: str) -> list[dict[str, Any]]:
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


@contextmanager
def _stop_on_signal(say: Say) -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C (or TERM) asks the loop to stop after its step; the second interrupts at once."""
    asked = False

    def ask(number: int, frame: object) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        say("stopping after this step, with a checkpoint (press Ctrl-C again to stop at once)")

    try:
        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: signals belong to the caller
        yield lambda: False
        return
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _plain(value: Any) -> Any:
    """What YAML gives back after writing: tuples as lists, paths as text."""
    return yaml.safe_load(json.dumps(value, default=str))


def resume_run(folder: str | Path, *, show: bool = True) -> Run:
    """Go on with the run in a folder, by the recipe that is kept there."""
    from posttrain.recipe import load_recipe

    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise PosttrainError(f"{folder} is not a run folder: no run.json in it; give the folder that a run wrote")
    return execute(load_recipe(folder / "recipe.yaml"), folder=folder, resume=True, show=show)
