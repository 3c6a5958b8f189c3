"""cuBLAS and cuSOLVER: what csrc/cuda/libraries.h says about them, against their headers and themselves.

They are large and not needed to build: the tests skip unless Q_GALORE_CUDA_HEADERS names the folder of their headers:

    pip install --no-deps --target F nvidia-cublas==13.1.1.3 nvidia-cusolver==12.0.4.66
    Q_GALORE_CUDA_HEADERS=F/nvidia/cu13/include

cuSOLVER itself is opened where nvidia-nvjitlink and nvidia-cusparse lie beside it.
"""

from __future__ import annotations

import ctypes
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "csrc" / "tests"
EMULATED = TESTS / "build/run/libq_galore_cuda_emulated.so"
HEADERS = os.environ.get("Q_GALORE_CUDA_HEADERS", "")
sys.path.insert(0, str(TESTS))
import registers  # noqa: E402

NVCC = registers.build.find_nvcc()
needs_headers = pytest.mark.skipif(not HEADERS, reason="Q_GALORE_CUDA_HEADERS does not say where cuBLAS' headers are")
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")

# One product and one size of the emulated GPU's table, in a process of its own: what is loaded there is loaded first.
PROGRAM = """
import ctypes, sys
lib = ctypes.CDLL(sys.argv[1])
class Params(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("device", ctypes.c_int32), ("allow_tf32", ctypes.c_int32)]
class Linalg(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32)] + [(n, ctypes.c_void_p) for n in
                ("context", "gemm", "potrf", "trtri", "qr", "work_size")]
for name in ("emulator_malloc", "emulator_stream", "qg_cuda_linalg", "qg_cuda_error"):
    getattr(lib, name).restype = ctypes.c_void_p
cuda, message = ctypes.c_void_p(), ctypes.create_string_buffer(512)
assert lib.qg_cuda_open(ctypes.byref(cuda), ctypes.byref(Params(12, 0, 0)), message, 512) == 0, message.value
workspace = ctypes.c_void_p(lib.emulator_malloc(ctypes.c_size_t(4096), ctypes.c_size_t(256), ctypes.c_size_t(0)))
stream = ctypes.c_void_p(lib.emulator_stream())
def begin():
    assert lib.qg_cuda_begin(cuda, stream, workspace, ctypes.c_size_t(4096)) == 0
table = ctypes.cast(lib.qg_cuda_linalg(cuda), ctypes.POINTER(Linalg)).contents
i64, ptr = ctypes.c_int64, ctypes.c_void_p
gemm = ctypes.CFUNCTYPE(ctypes.c_int, ptr, ctypes.c_int, ctypes.c_int32, i64, i64, i64, ptr, i64, i64, ptr, i64, i64,
                        ptr, i64)(table.gemm)
work_size = ctypes.CFUNCTYPE(ctypes.c_size_t, ptr, i64, i64)(table.work_size)
begin()
gemm(cuda, 0, 0, 1, 1, 1, workspace, 1, 1, workspace, 1, 1, workspace, 1)
print(ctypes.string_at(lib.qg_cuda_error(cuda)).decode())
begin()
work_size(ctypes.addressof(table), 4, 8)
print(ctypes.string_at(lib.qg_cuda_error(cuda)).decode())
"""


def _check_headers(libraries: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Compile csrc/tests/standin/headers.c with this text for csrc/cuda/libraries.h."""
    assert NVCC is not None
    (tmp_path / "cuda").mkdir()
    (tmp_path / "cuda/libraries.h").write_text(libraries)
    command = [NVCC, "-c", "-I", tmp_path, "-I", ROOT / "csrc", "-isystem", HEADERS, "-o", tmp_path / "headers.o"]
    done = [str(word) for word in [*command, TESTS / "standin/headers.c"]]
    return subprocess.run(done, capture_output=True, text=True)


@needs_headers
@needs_nvcc
def test_declarations_are_those_of_the_headers(tmp_path: Path) -> None:
    done = _check_headers((ROOT / "csrc/cuda/libraries.h").read_text(), tmp_path)
    assert done.returncode == 0, done.stderr


@needs_headers
@needs_nvcc
@pytest.mark.parametrize(
    ("right", "wrong", "named"),
    [
        ("int lwork, int *info", "int64_t lwork, int *info", "cusolverDn"),
        ("R_16BF = 14", "R_16BF = 15", "QG_TYPE_R_16BF"),
    ],
)
def test_a_wrong_declaration_is_found(tmp_path: Path, right: str, wrong: str, named: str) -> None:
    text = (ROOT / "csrc/cuda/libraries.h").read_text()
    changed = re.sub(re.escape(right), wrong, text, count=1)
    assert changed != text
    done = _check_headers(changed, tmp_path)
    assert done.returncode != 0
    assert "static assertion failed" in done.stderr
    assert named in done.stderr


@pytest.fixture(scope="module")
def answers() -> list[str]:
    """What the emulated GPU says after a product and a size query with the real libraries: they see no driver."""
    done = subprocess.run(["make", "-s", "-C", str(TESTS), "emulated"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    folder = Path(HEADERS).parent / "lib"
    environment = {
        **os.environ,
        "Q_GALORE_CUBLAS": str(folder / "libcublas.so.13"),
        "Q_GALORE_CUSOLVER": str(folder / "libcusolver.so.12"),
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [sys.executable, "-c", PROGRAM, str(EMULATED)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def _skip_without(folder: str, *names: str) -> None:
    for name in names:
        try:
            ctypes.CDLL(str(Path(folder) / name))
        except OSError as error:
            pytest.skip(f"{name} cannot be opened: {error}")


@needs_headers
def test_the_real_cublas_has_every_function_and_its_words_come_through(answers: list[str]) -> None:
    _skip_without(str(Path(HEADERS).parent / "lib"), "libcublasLt.so.13", "libcublas.so.13")
    assert answers[0] == "cuBLAS: cublasCreate failed: the library was not initialized (1)"


@needs_headers
def test_the_real_cusolver_has_every_function_and_its_number_comes_through(answers: list[str]) -> None:
    _skip_without(str(Path(HEADERS).parent / "lib"), "libnvJitLink.so.13", "libcusparse.so.12", "libcusolver.so.12")
    assert answers[1] == "cuSOLVER: cusolverDnCreate failed: CUSOLVER_STATUS_NOT_INITIALIZED (1)"
