"""The rollout engine on vLLM.

Before it draws, it makes sure that vLLM holds the policy's present weights: written once after they changed, loaded in
place without a restart, and tried on a few tokens. Where vLLM dies, it is started again (or waited for), given the
weights anew, and the whole call is repeated: each completion has its own seed, so that nothing is lost and nothing
changes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from posttrain.models.causal import CausalPolicy, evaluating
from posttrain.objective.batch import Batch
from posttrain.rollout.engine import Progress
from posttrain.rollout.rows import Ending, Row, start_rows
from posttrain.rollout.vllm.backend import Answer, Backend, EngineLost, Request, Shape, sampling_parameters
from posttrain.rollout.vllm.weights import Exchange, Weights, fingerprint
from posttrain.trajectory import Completion, Group, PosttrainError, Prompt, Sampling, Trajectory

ATTEMPTS = 3  # how often a call is repeated after vLLM was lost
PAUSE = 1.0  # seconds before the first repetition, twice as many before each later one
SCORED = 4096  # model tokens that are scored at a time, where the trainer has to score
PROBE = 8  # tokens on which fresh weights are tried
# mean difference of log-probabilities in nats, on the probe, above which vLLM computes another model
EXACT, ROUNDED = 1e-3, 0.25


class VllmEngine:
    """Completions from vLLM with the policy's present weights. See `Engine`.

    A completion depends on its own seed and its prompt alone, up to the rounding of the batch it was computed in:
    vLLM's products round differently with what else is in the batch, and a token that two roundings see on two sides of
    a border then differs.

    rows: completions that vLLM decodes together at most. exchange: a folder for weights that vLLM sees as well; None
    for one of this machine's. say: told of what went wrong and was mended.
    """

    def __init__(
        self,
        policy: CausalPolicy,
        backend: Backend,
        *,
        rows: int = 64,
        exchange: Path | None = None,
        say: Callable[[str], None] | None = None,
    ) -> None:
        if rows < 1:
            raise PosttrainError(f"rows is {rows}; expected at least 1 completion decoded at a time")
        self.policy, self.backend, self.rows = policy, backend, rows
        self.exchange = Exchange(exchange)
        self.say = say or _say
        self._weights: Weights | None = None
        self._marks: tuple[int, ...] | None = None
        self._tried: str | None = None  # the version that the probe found right

    def serve(self, policy: CausalPolicy) -> VllmEngine:
        """Draw from another policy from now on, of the same architecture: that of the next stage."""
        if policy is not self.policy:
            self.policy, self._marks = policy, None
        return self

    @property
    def max_length(self) -> int:
        """Tokens of prompt and completion together at most."""
        own, theirs = self.policy.max_length, self.backend.max_length
        return own if theirs is None else min(own, theirs)

    def generate(
        self,
        prompts: Sequence[Prompt],
        samples: int,
        sampling: Sampling,
        seed: int,
        progress: Progress | None = None,
    ) -> list[list[Completion]]:
        """See `Engine.generate`."""
        rows = start_rows(self.policy, prompts, samples, sampling, seed)
        if not rows:
            return []
        asked = [self._request(prompts[row.prompt], row) for row in rows]
        parameters = sampling_parameters(sampling, sorted(self.policy.end_tokens))

        def done(count: int) -> None:
            if progress is not None:
                progress(count, len(asked))

        answers = self._repeated(lambda: self.backend.generate(asked, parameters, done))
        return self._completions(prompts, rows, answers, sampling)

    def _request(self, prompt: Prompt, row: Row) -> Request:
        """A row with a seed from its own generator, as far as vLLM's context reaches."""
        room = self.max_length - len(prompt.tokens)
        if room < 1:
            raise PosttrainError(
                f"prompt {prompt.key} has {len(prompt.tokens)} tokens and vLLM's context is {self.max_length}, so no "
                f"completion fits: start it with a larger max_model_len"
            )
        return Request(prompt.tokens.tolist(), min(row.limit, room), int(row.noise.integers(1 << 63)))

    def close(self) -> None:
        """End vLLM where it was started for this engine, and remove the weights that lie in the exchange."""
        self.backend.close()
        self.exchange.close()

    # -- vLLM, alive and with the right weights ----------------------------------------------------------------------

    def _repeated(self, work: Callable[[], list[Answer]]) -> list[Answer]:
        """Do some work with the present weights; again where vLLM is lost on the way."""
        for attempt in range(ATTEMPTS + 1):
            try:
                self._synchronise()
                return work()
            except EngineLost as lost:
                if attempt == ATTEMPTS:
                    raise PosttrainError(
                        f"{lost}; repeated {ATTEMPTS} times without success: see to vLLM, and resume the run"
                    ) from lost
                self.say(f"{lost}; it is brought up again with the present weights, and the rollout is repeated")
                time.sleep(PAUSE * 2**attempt)
                self.backend.recover(self._model(), self._shape())
        raise AssertionError

    def _synchronise(self) -> None:
        """Bring vLLM up if it is not, and give it the policy's weights if it holds others."""
        marks = fingerprint(self.policy)
        if self._weights is None or marks != self._marks:
            self._weights, self._marks = self.exchange.write(self.policy), marks
        if not self.backend.running:
            self.backend.start(self._model(), self._shape())
        if self.backend.version() != self._weights.version:
            self.backend.update(self._weights)
            if self.backend.version() != self._weights.version:
                raise EngineLost(f"{self.backend.where} does not say that it holds the weights it was given")
            self._tried = None
        if self._tried != self._weights.version:
            self._probe()
            self._tried = self._weights.version

    def _model(self) -> Path:
        assert self._weights is not None
        return self.exchange.model(self.policy, self._weights)

    def _shape(self) -> Shape:
        return Shape(str(self.policy.dtype).removeprefix("torch."), self.rows, self.policy.max_length)

    def _probe(self) -> None:
        """Raise where vLLM gives the policy's tokens other log-probabilities than the trainer does."""
        prompt = torch.arange(3) % self.policy.head().weight.shape[0]
        greedy = sampling_parameters(Sampling(temperature=0), [])
        asked = Request(prompt.tolist(), max(1, min(PROBE, self.max_length - 3)), 0)
        (answer,) = self.backend.generate([asked], greedy, lambda count: None)
        expected = self._scored([prompt], [answer.tokens], 1.0)[0]
        apart = float((expected - torch.tensor(answer.logp)).abs().mean())
        exact = self.policy.dtype == torch.float32 and self.backend.exact_precision
        if not apart <= (EXACT if exact else ROUNDED):
            raise PosttrainError(
                f"{self.backend.where} does not compute {self.policy.name} as the trainer does: on a probe of "
                f"{len(answer.tokens)} tokens log-probabilities differ by {apart:.3g} nats on average, expected at "
                f"most {EXACT if exact else ROUNDED}; is it the same model? if it is, draw with engine: embedded"
            )

    # -- completions -------------------------------------------------------------------------------------------------

    def _completions(
        self, prompts: Sequence[Prompt], rows: list[Row], answers: list[Answer], sampling: Sampling
    ) -> list[list[Completion]]:
        """vLLM says log-probabilities as sampled. Those over the full vocabulary are the same without truncation; with
        it they are the trainer's own, computed here.
        """
        ending = Ending(self.policy, sampling)
        results: list[list[Completion]] = [[] for _ in prompts]
        scores: list[list[float]] = [answer.logp for answer in answers]
        if sampling.truncated and sampling.temperature > 0:
            starts = [prompts[row.prompt].tokens for row in rows]
            found = self._scored(starts, [answer.tokens for answer in answers], sampling.temperature)
            scores = [piece.tolist() for piece in found]
        for row, answer, full in zip(rows, answers, scores, strict=True):
            row.tokens, row.logp_full = answer.tokens, full
            row.logp = answer.logp if sampling.temperature > 0 else [0.0] * len(answer.tokens)
            results[row.prompt].append(ending.completion(row, answer.finish))
        return results

    def _scored(
        self, prompts: Sequence[torch.Tensor], completions: Sequence[list[int]], temperature: float
    ) -> list[torch.Tensor]:
        """The trainer's log-probabilities of completions over the full vocabulary, `[tokens]` fp32 each."""
        groups = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.cat([prompt, torch.tensor(completion, dtype=torch.int64)])
            groups.append(Group([Trajectory(tokens, torch.arange(len(tokens)) >= len(prompt))]))
        batch = Batch.of(groups)
        found = [torch.empty(0)] * len(groups)
        with torch.no_grad(), evaluating(self.policy.model):
            for sequences in batch.partition(SCORED, keep_groups=False):
                part = batch.select(sequences)
                logp = self.policy.log_likelihood(part, temperature=temperature).logp.float().cpu()
                for s, piece in zip(sequences.tolist(), logp.split(part.lengths.tolist()), strict=True):
                    found[s] = piece
        return found


def _say(text: str) -> None:
    print(f"posttrain: {text}", file=sys.stderr, flush=True)
