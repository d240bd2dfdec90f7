"""vLLM driven by this process: its scheduler and workers run in child processes that end with it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.rollout.vllm.backend import (
    CHANGING,
    EXTRAS,
    Answer,
    Done,
    EngineLost,
    Request,
    Shape,
    ended,
    exact,
    one_line,
    refused,
)
from posttrain.rollout.vllm.weights import Weights
from posttrain.trajectory import PosttrainError


class InProcess:
    """vLLM's offline engine. options: arguments of vLLM's engine."""

    where = "vLLM"

    def __init__(self, *, options: dict[str, Any] | None = None) -> None:
        self.options = dict(options or {})
        self.llm: Any = None
        self._asked = 0

    @property
    def exact_precision(self) -> bool:
        return exact(self.options)

    @property
    def running(self) -> bool:
        return self.llm is not None

    @property
    def max_length(self) -> int | None:
        return self.options.get("max_model_len") if self.llm is None else int(self.llm.model_config.max_model_len)

    def check(self) -> None:
        spec = importlib.util.find_spec("vllm")
        if spec is None or spec.origin is None:
            raise PosttrainError(
                f"vLLM is not installed: {EXTRAS}, or let it run in an environment of its own: "
                f"engine: {{name: vllm-server, python: PATH}}"
            )

    def start(self, folder: Path, shape: Shape) -> None:
        self.check()
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        from vllm import LLM

        from posttrain.rollout.vllm.arguments import engine_arguments

        arguments = engine_arguments(shape.dtype, shape.rows, shape.max_length, self.options)
        try:
            self.llm = LLM(str(folder), disable_log_stats=True, **{"use_tqdm_on_load": False, **arguments})
        except Exception as error:  # vLLM raises many types, and its processes tell their own reasons on the terminal
            raise PosttrainError(f"vLLM did not start ({one_line(error)}); its messages above tell why") from error

    def version(self) -> str:
        with self._living():
            return str(self.llm.get_weight_version())

    def update(self, weights: Weights) -> None:
        from vllm.v1.engine.exceptions import EngineDeadError

        llm = self.llm
        try:
            llm.update_weight_version(CHANGING)
            llm.init_weight_transfer_engine({"init_info": {}})
            llm.start_weight_update()
            llm.update_weights({"update_info": {"folder": str(weights.folder), "files": weights.files}})
            llm.update_weights({"update_info": {"complete": True}})
            llm.finish_weight_update(weights.version)
            kept = not llm.reset_prefix_cache()
        except EngineDeadError as error:
            raise EngineLost(f"vLLM's engine died while it took the weights ({one_line(error)})") from error
        except Exception as error:  # what a worker raises arrives as a plain Exception
            raise PosttrainError(f"vLLM did not take the weights of {weights.folder}: {one_line(error)}") from error
        if kept:
            raise EngineLost("vLLM kept prompts that it cached by the weights before")

    def generate(self, asked: Sequence[Request], sampling: dict[str, Any], done: Done) -> list[Answer]:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self.llm.llm_engine
        detokenize = bool(sampling["stop"])
        places: dict[str, int] = {}
        answers: list[Answer | None] = [None] * len(asked)
        with self._living():
            for i, request in enumerate(asked):
                parameters = SamplingParams(
                    **sampling,
                    max_tokens=request.max_tokens,
                    seed=request.seed,
                    detokenize=detokenize,
                    output_kind=RequestOutputKind.FINAL_ONLY,
                )
                self._asked += 1
                name = f"posttrain-{self._asked}"
                places[name] = i
                engine.add_request(name, {"prompt_token_ids": request.prompt}, parameters)
            finished = 0
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        if output.finished:
                            answers[places[output.request_id]] = self._answer(output.outputs[0])
                            finished += 1
                            done(finished)
            except KeyboardInterrupt:
                engine.abort_request(list(places))
                raise
        if any(answer is None for answer in answers):
            raise EngineLost("vLLM finished without an answer for every request")
        return [answer for answer in answers if answer is not None]

    def _answer(self, output: Any) -> Answer:
        tokens = list(output.token_ids)
        logp = [float(at[token].logprob) for at, token in zip(output.logprobs, tokens, strict=True)]
        return Answer(tokens, logp, ended(output.finish_reason, self.where))

    def recover(self, folder: Path, shape: Shape) -> None:
        self.close()
        self.start(folder, shape)

    def close(self) -> None:
        if self.llm is not None:
            with contextlib.suppress(Exception):  # what is left of an engine that died may fail in any way
                self.llm.llm_engine.engine_core.shutdown()
            self.llm = None

    @contextlib.contextmanager
    def _living(self) -> Any:
        """vLLM's errors in our words: a dead engine is lost, a refused request is the user's to mend."""
        from vllm.v1.engine.exceptions import EngineDeadError, EngineGenerateError

        try:
            yield
        except (EngineDeadError, EngineGenerateError) as error:
            raise EngineLost(f"vLLM's engine died ({one_line(error)})") from error
        except ValueError as error:
            raise refused(self.where, str(error)) from error
