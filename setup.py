"""What is written in C for the CPU, built where there is a C compiler; everything else stands in pyproject.toml.

Without a compiler, or with one that cannot build it, the package is installed without it: packed layers are slow and
say so (`posttrain.compress.kernels.library`), training is somewhat slower (`posttrain.native.library`).
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

KERNELS = Path("src/posttrain/compress/kernels/native")
ROWWISE = Path("src/posttrain/native/src")
# sums are to be rounded as they are written: no multiplication is fused with an addition unless it says so
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
THREADS = ["-fopenmp"]
# loops with comparisons become vectors only so; no value changes
VECTORS = ["-fno-trapping-math", "-fno-math-errno"]


class BuildKernels(build_ext):
    """With OpenMP, or for a single thread where the compiler lacks it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args = [flag for flag in ext.extra_compile_args if flag not in THREADS]
            ext.extra_link_args = []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "posttrain.compress.kernels._native",
            sources=sorted(str(path) for path in KERNELS.glob("*.c")),
            depends=sorted(str(path) for path in KERNELS.glob("*.h")),
            extra_compile_args=FLAGS + THREADS,
            extra_link_args=THREADS,
            optional=True,
        ),
        Extension(
            "posttrain.native._fused",
            sources=[str(ROWWISE / "fused.c")],
            depends=[str(ROWWISE / name) for name in ["fused.h", *(path.name for path in ROWWISE.glob("*.inc"))]],
            extra_compile_args=FLAGS + VECTORS + THREADS,
            extra_link_args=THREADS,
            libraries=["m"],
            optional=True,
        ),
    ]
    if platform.system() != "Windows"  # its compiler takes neither these flags nor the intrinsics' attributes
    else [],
    cmdclass={"build_ext": BuildKernels},
)
