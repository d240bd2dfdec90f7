"""A run: model, stages, evaluations before and after, carried out in a folder that holds all of it.

Killed at any moment and run again with `resume`, it goes on from the newest checkpoint and ends in the same weights as
a run that was never killed. Of several processes each carries out the same run; the first writes and speaks for all.
"""

from __future__ import annotations

import errno
import hashlib
import json
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

from posttrain.compress.policy import CompressedPolicy
from posttrain.data.dataset import Dataset, load_dataset
from posttrain.evaluation.evaluate import evaluate
from posttrain.evaluation.evaluation import Evaluation, compare
from posttrain.evaluation.task import Task
from posttrain.models.adapters import add_lora
from posttrain.models.causal import CausalPolicy
from posttrain.models.load import load
from posttrain.processes import agree, any_of, everyone, here, led, lost, same, start
from posttrain.recipe import Recipe, StageSpec
from posttrain.recipe_compress import CompressSpec
from posttrain.report import build
from posttrain.reward.reward import reward_from
from posttrain.rollout.engine import Progress
from posttrain.rollout.engine_choice import Engines, engine_for
from posttrain.run_cluster import on_cluster, pooled
from posttrain.run_compress import check_stage, compress_stage, in_words
from posttrain.run_folder import FAILED, RunFolder, now, plain
from posttrain.terminal import Counter, printable
from posttrain.training.collect import Offline, Online, Source
from posttrain.training.loop import Trainer
from posttrain.training.scoring import heldout_loss, sequence_scores
from posttrain.training.track import Tracker
from posttrain.trajectory import Group, PosttrainError, Prompt

Say = Callable[[str], None]
NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)


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


def execute(
    recipe: Recipe,
    *,
    folder: Path | None = None,
    resume: bool = False,
    show: bool = True,
    command: str | None = None,
    policy: CausalPolicy | None = None,
    shard: bool | None = None,
) -> Run:
    """Carry out a recipe.

    Args:
        folder: the run folder; by default the recipe's `output`, else a new one under `runs/`.
        resume: go on with the run in `folder` where it stopped (or return it if it is finished); a folder that does
            not exist yet is begun.
        show: progress on standard error.
        policy: a model that is already loaded, in place of the recipe's; to resume, as it was at the run's start.
        shard: of several processes (torchrun, accelerate launch): spread the weights over them (FSDP2) instead of a
            copy in each; None does what `accelerate launch --use_fsdp` says.
    Raises:
        PosttrainError: anything a user can mend; Interrupted after Ctrl-C.
    """
    show = start(shard).main and show
    same(_digest(recipe), "the recipe")
    if here().several and not recipe.engine.embedded:
        raise PosttrainError(f"engine {recipe.engine.name}: processes that train together draw with the embedded one")
    where = Path(agree(str(folder or recipe.output or _fresh_folder(recipe))))
    say: Say = (lambda text: print(printable(text), file=sys.stderr, flush=True)) if show else (lambda text: None)
    task = recipe.built_task()
    with _room(where):
        made = led(lambda: RunFolder.open(where, recipe, resume=resume, command=command, task=task))
        if made is None and not (where / "run.json").is_file():
            raise PosttrainError(f"{here()} does not see {where}; all must share it: choose another output")
        memory = made or RunFolder.read(where)
        with memory.locked(), _stop_on_signal(say) as stop:
            try:
                return _Execution(recipe, memory, task, say, show, stop).all(policy)
            except BaseException as error:
                stop.over = True
                if lost(error):
                    error = PosttrainError(
                        f"another process has ended or cannot be reached, and the run with it; its own message says "
                        f"why ({' '.join(str(error).split())[:200]}); {_how_to_go_on(where)}"
                    )
                # an interrupt in the middle of an import comes out of some libraries as another error
                if isinstance(error, Interrupted | KeyboardInterrupt) or stop.interrupted:
                    with suppress(OSError):  # on a full disk, too, the user is told how to go on
                        memory.save(status="interrupted")
                        if here().main:
                            build(where)
                    if isinstance(error, Interrupted):
                        raise
                    raise Interrupted(f"stopped; what is finished is kept; {_how_to_go_on(where)}") from None
                with suppress(OSError):  # on a full disk the error itself is what the user must see
                    memory.save(status="failed")
                    memory.note(f"{FAILED}{str(error) or type(error).__name__}")
                    if not resume:
                        memory.discard_if_empty()
                raise error


@contextmanager
def _room(folder: Path) -> Iterator[None]:
    """A full or read-only disk is an error that the user can mend."""
    try:
        yield
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        raise PosttrainError(f"cannot write to {folder}: {error}; free some space and resume") from error


def _digest(recipe: Recipe) -> str:
    """Of what all processes must carry out."""
    return hashlib.sha256(json.dumps(plain(recipe.resolved()), sort_keys=True).encode()).hexdigest()[:16]


def _how_to_go_on(folder: Path) -> str:
    return f"go on with: posttrain run --resume {shlex.quote(str(folder))}"


def _fresh_folder(recipe: Recipe) -> Path:
    name = "-".join(stage.method.name for stage in recipe.stages)
    name += datetime.now().strftime("-%Y%m%d-%H%M%S")
    taken = (Path("runs") / f"{name}{suffix}" for suffix in ("", *(f"-{n}" for n in range(2, 1000))))
    return next(path for path in taken if not path.exists())


def resume_run(folder: str | Path, *, show: bool = True, shard: bool | None = None) -> Run:
    """Go on with the run in a folder, by the recipe that is kept there."""
    from posttrain.recipe import load_recipe

    folder = Path(folder)
    if not (folder / "run.json").is_file():
        raise PosttrainError(f"{folder} is not a run folder: no run.json in it; give the folder that a run wrote")
    held = RunFolder.read(folder).values["only_in_python"]
    if held:
        raise PosttrainError(
            f"{folder} was started from Python with what its recipe.yaml cannot hold ({', '.join(held)}); "
            f"resume it there: train(..., folder={str(folder)!r}, resume=True)"
        )
    return execute(load_recipe(folder / "recipe.yaml"), folder=folder, resume=True, show=show, shard=shard)


class _Execution:
    """The stages of a run, one after the other."""

    def __init__(self, recipe: Recipe, memory: RunFolder, task: Task | None, say: Say, show: bool, stop: _Stop) -> None:
        self.recipe, self.memory, self.task = recipe, memory, task
        self.say, self.show, self.stop = say, show, stop
        self.engines = Engines(recipe.engine, say)

    def all(self, policy: CausalPolicy | None) -> Run:
        """Carry out what is left of the run; whatever happens, an engine that was started for it ends."""
        try:
            self.engines.check()
            with on_cluster(self.recipe.cluster):
                return self._all(policy)
        finally:
            self.engines.close()

    def _all(self, policy: CausalPolicy | None) -> Run:
        last = len(self.recipe.stages) - 1
        done = self.memory.stages_done()
        policy = self._policy(done, policy)
        if self.task is not None and not self.task.multiple_choice and done < last:
            prompts = self.task.prompts(policy.tokenizer, "heldout", self.recipe.evaluate.holdout)
            _check_lengths("held-out problems", [len(p.tokens) + 1 for p in prompts], policy.max_length)
        for stage in self.recipe.stages[done + 1 :]:
            if isinstance(stage, CompressSpec):
                check_stage(stage, policy, self.task)
        if done < 0 and self.recipe.evaluate.before:
            self._evaluate(policy, -1, "before")
        for i in range(last + 1):
            if i > done:
                packs = isinstance(self.recipe.stages[i], CompressSpec)
                with self.stop.patiently("this block" if packs else "this step, with a checkpoint"):
                    policy = self._stage(i, policy)
                    self.memory.save_model(policy, i)
                if self.stop():
                    name = self.recipe.stages[i].method.name
                    raise Interrupted(f"stopped after {name}, which is finished; {_how_to_go_on(self.memory.path)}")
            if here().main:
                shutil.rmtree(self.memory.stage(i) / "checkpoints", ignore_errors=True)
            if i >= done:
                self._evaluate(policy, i, f"after {self.recipe.stages[i].method.name}")
        before, after = self.memory.evaluation(-1), self.memory.evaluation(last)
        if self.memory.values["status"] != "finished":
            if before is not None and after is not None:
                self.memory.add_comparison(compare(before, after))
            self.memory.save(status="finished", finished=now())
        report = led(lambda: build(self.memory.path)) or self.memory.path / "report.html"
        return Run(self.memory.path, policy, report, before, after)

    def _policy(self, done: int, given: CausalPolicy | None) -> CausalPolicy:
        """The policy as the last finished stage left it."""
        spec = self.recipe.model
        if done < 0:
            if given is None:
                self.say(f"loading {spec.id}")
                given = load(**{("model" if k == "id" else k): v for k, v in spec.model_dump().items()})
            if any(isinstance(stage, StageSpec) for stage in self.recipe.stages):
                given.trainable_parameters()  # a compressed model says that it has none, before anything is measured
            self.memory.starts_from(given)
            return given
        where = self.memory.stage_model(done)
        found = load(where, precision=spec.precision, device=spec.device, trust_remote_code=spec.trust_remote_code)
        found.name = spec.id
        return found

    # -- stages ------------------------------------------------------------------------------------------------------

    def _stage(self, i: int, policy: CausalPolicy) -> CausalPolicy:
        """Carry out one stage; an adapter is merged at its end, and taken off where the stage does not reach it."""
        from transformers import set_seed

        stage = self.recipe.stages[i]
        # of torch, numpy and Python, since a user's reward may draw from any
        set_seed((self.recipe.seed * 1_000 + i) % (1 << 32))
        if isinstance(stage, CompressSpec):
            return self._compress(i, stage, policy)
        if not stage.method.settings.lora:
            policy.model.requires_grad_(True)
            self._train(i, stage, policy)
            return policy
        adapted = add_lora(policy, rank=stage.method.settings.lora, seed=self.recipe.seed)
        try:
            self._train(i, stage, adapted)
        except BaseException:
            adapted.model.unload()
            raise
        merged = CausalPolicy(adapted.model.merge_and_unload(), policy.tokenizer, policy.name)
        merged._packs = adapted._packs
        return merged

    def _compress(self, i: int, stage: CompressSpec, policy: CausalPolicy) -> CausalPolicy:
        """The policy compressed; stopped or killed midway, the stage starts again from the model before it."""
        name = stage.method.name
        begun = time.perf_counter()
        with Counter(f"{name}: blocks", "blocks", show=self.show) as counter:

            def progress(done: int, total: int) -> None:
                counter(done, total)
                if self.stop() and done < total:
                    raise Interrupted(
                        f"stopped at block {done} of {total} of {name}, which starts again; "
                        f"{_how_to_go_on(self.memory.path)}"
                    )

            made, record = compress_stage(stage, policy, self.task, self.recipe.seed, progress)
        seconds = round(time.perf_counter() - begun, 2)
        self.memory.values["stages"][i] |= {"compression": record, "seconds": seconds}
        self.memory.note(in_words(record))
        self.memory.save()
        self.say(f"{in_words(record)}; in {seconds:.0f} s")
        return made

    def _train(self, i: int, stage: StageSpec, policy: CausalPolicy) -> None:
        name = stage.method.name
        source, heldout = self._source(i, stage, policy)
        total = stage.method.settings.total_steps(source.rows)
        self.memory.values["stages"][i]["steps"] = total
        self.memory.save()
        place = self.memory.path if here().main else None
        with (
            Tracker(place, i, name, total, show=self.show, keep=self.memory.note) as tracker,
            pooled(source, policy, self.recipe.cluster, self.say),
        ):
            trainer = Trainer(
                policy,
                stage.method,
                source,
                folder=self.memory.stage(i) / "checkpoints",
                seed=self.recipe.seed,
                tracker=tracker,
                evaluator=self._evaluator(policy, stage, heldout),
                stop=self.stop,
            )
            if trainer.total != total:  # the sampler chose among the rows
                self.memory.values["stages"][i]["steps"] = total = tracker.total = trainer.total
                self.memory.save()
            before = heldout_loss(trainer, heldout) if heldout else None
            outcome = trainer.run()
        if outcome.status == "interrupted":
            raise Interrupted(
                f"stopped at step {outcome.progress.step} of {total} of {name}; the checkpoint is kept; "
                f"{_how_to_go_on(self.memory.path)}"
            )
        if before is not None:
            self.memory.note(f"{name}: held-out loss {before:.4f} -> {heldout_loss(trainer, heldout):.4f}")
        if not isinstance(source, Online):
            return
        told = everyone([source.reward.failures(), source.reward.first_error])  # each process scored some
        if failed := "; ".join(failures for failures, _ in told if failures):
            note = f"{name}: rewards that raised: {failed}; the first: {next(first for _, first in told if first)}"
            self.memory.note(note)
            self.say(note)

    def _source(self, i: int, stage: StageSpec, policy: CausalPolicy) -> tuple[Source, list[Group]]:
        """Where the stage's groups come from, and held-out rows of its data."""
        method, settings = stage.method, stage.method.settings
        rows, heldout = self._rows(stage, policy)
        if not rows:
            raise PosttrainError(f"{method.name}: no row to train on")
        if len(rows) == 1 and settings.rows != 1:
            raise PosttrainError(f"{method.name}: 1 row to train on; expected 2 or more (rows: 1 trains on it alone)")
        lengths = [len(r.tokens) + 1 if isinstance(r, Prompt) else max(t.length for t in r.trajectories) for r in rows]
        _check_lengths(f"{method.name}: training rows", lengths, policy.max_length)
        sampler = method.sampler(rows, self.recipe.seed + i)
        if not method.online:
            return Offline([r for r in rows if isinstance(r, Group)], sampler, settings), heldout
        prompts = [r for r in rows if isinstance(r, Prompt)]
        if stage.reward is not None:
            reward = reward_from(stage.reward)
        else:
            assert self.task is not None
            reward = self.task.reward.afresh()  # to count the failures of training alone
        engine = self.engines.of(policy, settings.rollout_rows)
        environment = self.task.environment if self.task is not None else None
        return Online(prompts, sampler, settings, engine, reward, self.recipe.seed * 1_000 + i, environment), heldout

    def _rows(self, stage: StageSpec, policy: CausalPolicy) -> tuple[list[Group | Prompt], list[Group]]:
        method, limit = stage.method, stage.method.settings.rows
        if stage.data is None:
            assert self.task is not None
            if method.online:
                solved = method.wants_demonstrations
                return list(self.task.prompts(policy.tokenizer, "train", limit, demonstrations=solved)), []
            return list(self.task.demonstrations(policy.tokenizer, limit)), []
        options = stage.data.model_dump(exclude={"heldout"})
        options["kind"] = options["kind"] or method.data
        options["max_length"] = options["max_length"] or policy.max_length
        data: Dataset = load_dataset(options.pop("source"), policy.tokenizer, limit=limit, **options)
        if data.kind != method.data:
            raise PosttrainError(f"{method.name} learns from {method.data}; {data.name} holds {data.kind}")
        self.memory.note(data.summary())
        held = stage.data.heldout
        count = int(held) if held >= 1 or not held else max(1, round(held * len(data)))
        items = list(data)
        if count and method.online:
            raise PosttrainError(f"{method.name}: heldout applies to offline data; give a task to evaluate on")
        if count >= len(items):
            raise PosttrainError(
                f"{method.name}: heldout is {held:g} of {len(items)} rows; nothing is left to train on"
            )
        return items[: len(items) - count], [g for g in items[len(items) - count :] if isinstance(g, Group)]

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

    def _measure(
        self, policy: CausalPolicy, limit: int | None, samples: int, progress: Progress | None = None
    ) -> Evaluation:
        assert self.task is not None
        spec = self.recipe.evaluate
        temperature = spec.temperature if spec.temperature is not None else (0.0 if samples == 1 else 1.0)
        # packed weights are no model of vLLM's
        engine = engine_for(policy) if isinstance(policy, CompressedPolicy) else self.engines.of(policy)
        return evaluate(
            engine,
            policy.tokenizer,
            self.task,
            samples=samples,
            sampling=replace(self.task.sampling, max_tokens=spec.max_tokens, temperature=temperature),
            limit=limit,
            ks=tuple(k for k in spec.k if k <= samples),
            seed=self.recipe.seed,
            progress=progress,
            likelihood=lambda trajectories: sequence_scores(policy, trajectories),
        )

    def _evaluate(self, policy: CausalPolicy, stage: int, label: str) -> None:
        """Evaluate on the held-out prompts once, and write it down."""
        if self.task is None or self.memory.evaluation(stage) is not None:
            return
        begun = time.perf_counter()
        spec = self.recipe.evaluate
        with Counter(f"evaluation {label}", show=self.show) as progress:
            found = self._measure(policy, spec.holdout, spec.samples, progress)
        seconds = time.perf_counter() - begun
        self.memory.add_evaluation(found, stage, label, seconds)
        self.say(f"{label}: {found.summary()} in {seconds:.0f} s")


def _check_lengths(what: str, lengths: Sequence[int], context: int) -> None:
    """Raise before any work is done where sequences do not fit the model."""
    if long := [length for length in lengths if length > context]:
        raise PosttrainError(
            f"{what}: {len(long)} of {len(lengths)} exceed the model's context of {context} tokens "
            f"(the longest needs {max(long)}); shorten them or take a model with a longer context"
        )


class _Stop:
    """Whether a signal asked the run to stop.

    While work goes on that would be lost, the first Ctrl-C (or TERM) only asks: the loop stops after its step, with a
    checkpoint. At any other time, and the second time, it interrupts at once. Once the run is over there is nothing to
    stop: what became of it is written and told first. A launcher sends TERM to all when one of its processes has ended.
    """

    def __init__(self, say: Say) -> None:
        self.say, self.asked, self.interrupted, self.over = say, False, False, False
        self.until = ""  # what the work at hand goes on to, if it is patient

    def __call__(self) -> bool:
        """Whether any process was asked to stop; all ask together."""
        return any_of(self.asked)

    def signalled(self, number: int, frame: object) -> None:
        if self.over:
            return
        if self.asked or not self.until:
            self.interrupted = True
            raise KeyboardInterrupt
        self.asked = True
        self.say(f"stopping after {self.until} (press Ctrl-C again to stop at once)")

    @contextmanager
    def patiently(self, until: str) -> Iterator[None]:
        self.until = until
        try:
            yield
        finally:
            self.until = ""


@contextmanager
def _stop_on_signal(say: Say) -> Iterator[_Stop]:
    """A `_Stop` that listens; outside of the main thread signals belong to the caller, and it stays silent."""
    stop = _Stop(say)
    try:
        before = {s: signal.signal(s, stop.signalled) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:
        yield stop
        return
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
