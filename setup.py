"""The CPU kernels of packed weights, built where there is a C compiler; everything else stands in pyproject.toml.

Without a compiler, or with one that cannot build them, the package is installed without them and says so when they are
missed (`posttrain.compress.kernels.library`).
"""

import platform
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NATIVE = Path("src/posttrain/compress/kernels/native")
# sums are to be rounded as they are written: no multiplication is fused with an addition unless it says so
FLAGS = ["-O3", "-std=c11", "-ffp-contract=off", "-fvisibility=hidden", "-Wno-psabi"]
THREADS = ["-fopenmp"]


class BuildKernels(build_ext):
    """With OpenMP, or for a single thread where the compiler lacks it."""

    def build_extension(self, ext: Extension) -> None:
        try:
            super().build_extension(ext)
        except (CompileError, LinkError):
            ext.extra_compile_args, ext.extra_link_args = FLAGS, []
            super().build_extension(ext)


setup(
    ext_modules=[
        Extension(
            "posttrain.compress.kernels._native",
            sources=sorted(str(path) for path in NATIVE.glob("*.c")),
            depends=sorted(str(path) for path in NATIVE.glob("*.h")),
            extra_compile_args=FLAGS + THREADS,
            extra_link_args=THREADS,
            optional=True,
        )
    ]
    if platform.system() != "Windows"  # its compiler takes neither these flags nor the intrinsics' attributes
    else [],
    cmdclass={"build_ext": BuildKernels},
)
