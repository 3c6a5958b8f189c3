"""The CUDA kernels, run by the emulator of csrc/tests, under the ordinary ops and the optimizer.

Each test is a process of its own: a fault that the emulator finds ends it.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import emulated

HERE = Path(__file__).resolve().parent
pytestmark = pytest.mark.skipif(emulated.wanted(), reason="the whole run is on the emulated kernels")

# Some of each object; QG_TEST_BACKEND=emulated pytest runs all of them.
SELECTION = {
    "noise": ["noise_equals_reference"],
    "int8": ["int8_equals_reference"],
    "dynamic8": ["dynamic8_equals_reference[7-True]"],
    "projector": [f"projector_equals_reference[256-{name}]" for name in ("int4", "fp8", "nf4", "bfloat16")],
    "adam8": ["adam8_equals_reference", "adam8_leaves_flagged_parameters_alone"],
    "galore_step": [
        "galore_moments_equal_reference",
        "galore_list_equals_one_by_one",
        "a_flagged_matrix_is_left_alone",
    ],
    "subspace": ["a_gradient_without_direction_keeps_the_basis_bit_for_bit"],
    "optimizer": ["every_subspace_option_trains"],
    "layer": ["micro_batches_equal_one_batch"],
}


@pytest.fixture(scope="module", autouse=True)
def _built() -> None:
    subprocess.run(["make", "-s", "-C", HERE.parent / "csrc/tests", "emulated"], check=True)
    assert not emulated.missing()


def run(*command: str) -> str:
    """What a program prints on one thread; it must succeed."""
    environment = {**os.environ, "QG_TEST_BACKEND": "emulated", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_ops_and_layers_pass_their_own_tests() -> None:
    chosen = [f"tests/test_{name}.py::test_{test}" for name, tests in SELECTION.items() for test in tests]
    printed = run("-m", "pytest", "-q", "-p", "no:cacheprovider", *chosen)
    assert " passed" in printed and "failed" not in printed


def test_training_is_that_of_the_cpu_and_waits_for_nothing() -> None:
    printed = run("tests/emulated_program.py")
    assert printed.count("as on the CPU") == 4 and "launches in a step" in printed
    assert "the gradient of 2.coordinates is not finite; its step 11 left it alone and updated the others" in printed
