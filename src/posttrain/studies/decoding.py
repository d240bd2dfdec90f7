"""How quantized models take to decoding: do the distances that card 136 defines order the quantizers, and does
temperature cost quantized models more than the float one.
"""

from __future__ import annotations

from posttrain import methods
from posttrain.compress.calibrate import whole_sequences
from posttrain.compress.method import Compression
from posttrain.compress.policy import compressed_copy
from posttrain.evaluation.decoding import DecodingSensitivity, decoding_sensitivity
from posttrain.evaluation.decoding_grid import TEMPERATURES, DecodingGrid
from posttrain.lab import text
from posttrain.models.causal import CausalPolicy
from posttrain.studies.compression import MODELS
from posttrain.studies.registry import study
from posttrain.studies.study import Arm, Measured, Study
from posttrain.studies.verdict import AtLeast, Better, Lower, Within

SAMPLES, PROBLEMS = 5, 100
CALIBRATION = 8  # rows, which none of these quantizers looks at


@study(method=("llm-int8", "nf4", "fp4"), card="136")
def decoding_sensitivity_of_quantizers() -> Study:
    """Next-token distributions depart in the order of the quantizers' errors, and less the hotter they are.

    The card's check is on a model of the lab that was trained in fp32 (SmolLM2's bundled weights lie on a grid of 4
    bits). Every quantizer is beside its own float model with the same random numbers: temperatures 0.1 to 1, five
    samples of 100 held-out problems of four subjects. `kl at T` and `variation at T` are of next tokens on text that
    the float model wrote. `falls` is KL at 0.5 less KL at 1. `quality` is the accuracy over all temperatures; `std` its
    standard deviation over them; `drop` how much of it a rise of the temperature by 1 would cost, from 0.5 to 0.8.

    Double quantization moves scales by less than a percent, so that nf4 with and without should be the same in quality.
    The paper finds nf4 about as good as fp4, and four-bit models more sensitive to temperature than the float one. On a
    small model the noise of a hundred problems may hide the latter; what is said of the distances has little noise.

    Rule, fixed before the run: at temperatures 0.5 and 1, KL of llm-int8 below nf4's, nf4's below fp4's, fp4's below
    that of three bits to nearest; KL of nf4 and fp4 at 0.5 at least what it is at 1; quality of nf4 and fp4 within 5
    points, and of nf4 with and without double quantization within 2; drop of nf4 and fp4 larger than that of the float
    model.
    """
    arms = {
        "float": decoded(None),
        "llm-int8": decoded(methods.llm_int8()),
        "nf4": decoded(methods.nf4(double=False)),
        "nf4, double": decoded(methods.nf4()),
        "fp4": decoded(methods.fp4()),
        "three bits": decoded(methods.rtn(3, 64, zero="none")),
    }
    order = [("llm-int8", "nf4"), ("nf4", "fp4"), ("fp4", "three bits")]
    return Study(
        claim="Quantizers part from the float model in the order of their errors and the more the lower the "
        "temperature; nf4 is about as good as fp4; temperature costs four-bit models more than the float one.",
        setting=f"lab model mixed, {MODELS} models; {PROBLEMS} held-out problems, {SAMPLES} samples at each of "
        f"{len(TEMPERATURES)} temperatures.",
        arms=arms,
        expectations=(
            *(
                Lower(low, than=high, metric=f"kl at {at}", why="the finer grid errs less")
                for at in ("0.5", "1")
                for low, high in order
            ),
            *(AtLeast(name, metric="falls", value=0.0, why="heat evens both out") for name in ("nf4", "fp4")),
            Within("nf4", of="fp4", metric="quality", tolerance=0.05, why="the paper's nf4 ≈ fp4"),
            Within("nf4, double", of="nf4", metric="quality", tolerance=0.02, why="scales move by less than a percent"),
            *(Better(n, than="float", metric="drop", why="the paper's 0.5 to 0.8") for n in ("nf4", "fp4")),
        ),
    )


def decoded(method: Compression | None, models: int = MODELS, samples: int = SAMPLES, problems: int = PROBLEMS) -> Arm:
    """An arm that compresses the lab's language model and decodes its task at every temperature, beside the float one.

    Figures: `quality`, `std`, `excess` (of it over the float model's), `drop`; and of a compressed model `kl at T`,
    `variation at T` and `entropy at T` for T 0.1, 0.5 and 1, `falls`, `flips`.
    """
    from posttrain import lab

    arguments = {
        "method": method, "model": lab.preset("mixed").key, "models": models, "samples": samples, "problems": problems
    }  # fmt: skip
    return Arm(run_decoded, arguments, (decoding_sensitivity,))


def run_decoded(
    seed: int,
    quick: bool,
    *,
    method: Compression | None,
    models: int,
    samples: int,
    problems: int,
    model: str = "",
) -> Measured:
    """See `decoded`; `model` is the preset's key in the lab."""
    from posttrain import lab

    if quick:
        models, samples, problems = 1, 1, 8
    policy, task, spec = lab.model("mixed", seed % models), lab.task("mixed"), lab.preset("mixed")
    compared: dict[str, CausalPolicy] = {"float": policy}
    if method is not None:
        compared["compressed"] = compressed_copy(
            policy, method, whole_sequences(text.fresh(spec, CALIBRATION, seed)), seed=seed
        )
    grid = DecodingGrid(base=task.sampling)
    found = decoding_sensitivity(compared, task, grid, samples=samples, limit=problems, seed=seed)
    return Measured(figures(found, list(compared)[-1]))


def figures(found: DecodingSensitivity, name: str) -> dict[str, float]:
    """Of one of the models, as `decoded` says."""
    slope = found.slope(name)
    assert slope is not None
    told = {
        "quality": float(found.right[name].mean()),
        "std": found.sensitivity(name, "temperature").value,
        "excess": found.excess(name, "temperature").value,
        "drop": -slope.value,
    }
    if name not in found.shifts:
        return told
    at = {f"{setting.value:g}": shift for setting, shift in zip(found.grid.settings, found.shifts[name], strict=True)}
    for temperature in ("0.1", "0.5", "1"):
        shift = at[temperature]
        told |= {
            f"kl at {temperature}": shift.kl, f"variation at {temperature}": shift.variation,
            f"entropy at {temperature}": shift.entropy,
        }  # fmt: skip
    return told | {"falls": at["0.5"].kl - at["1"].kl, "flips": at["1"].flips}
