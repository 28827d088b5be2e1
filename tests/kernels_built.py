"""The CPU kernels, compiled once for a test run; tests that need them are skipped where there is no compiler."""

import shutil
from functools import cache
from pathlib import Path
from tempfile import gettempdir

import pytest

from smelt.models.kernels import Kernels, compiled, loaded_openmp


@cache
def built_kernels() -> Kernels:
    compiler, openmp = shutil.which("g++"), loaded_openmp()
    if compiler is None or openmp is None:
        pytest.skip("needs g++ and torch's OpenMP")
    return Kernels(compiled(Path(gettempdir()) / "smelt-test-kernels", compiler, openmp))
