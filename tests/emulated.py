"""The ordinary ops on the CUDA kernels, which the emulator of csrc/tests runs on the CPU.

With ``QG_TEST_BACKEND=emulated`` conftest.py does so for all tests. ``make -C csrc/tests emulated`` builds what is
needed.
"""

from __future__ import annotations

import ctypes
import os
from pathlib import Path

import torch

import q_galore_torch as qg

BUILT = Path(__file__).resolve().parent.parent / "csrc/tests/build/run"
LIBRARY = BUILT / "libq_galore_cuda_emulated.so"
STANDINS = {"Q_GALORE_CUBLAS": "libcublas.so.13", "Q_GALORE_CUSOLVER": "libcusolver.so.12"}
WORKSPACE, ALIGNMENT = 8 << 20, 256


class _Params(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_uint32), ("device", ctypes.c_int32), ("allow_tf32", ctypes.c_int32)]


class _Counts(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in ("launches", "loaded", "stored", "threads", "blocks")]


def wanted() -> bool:
    """Whether the environment asks for the emulated kernels."""
    backend = os.environ.get("QG_TEST_BACKEND", "cpu")
    if backend not in ("cpu", "emulated"):
        raise ValueError(f"QG_TEST_BACKEND must be cpu or emulated, got {backend}")
    return backend == "emulated"


def missing() -> str:
    """What has to be built first, "" for nothing."""
    paths = [LIBRARY, *(BUILT / "standin" / name for name in STANDINS.values())]
    absent = [path.name for path in paths if not path.exists()]
    return f"make -C csrc/tests emulated has not built {', '.join(absent)}" if absent else ""


class Emulated:
    """One emulated GPU, which does the CPU's work from :meth:`use` on. It must outlive its last use."""

    def __init__(self) -> None:
        if missing():
            raise RuntimeError(missing())
        for variable, name in STANDINS.items():
            os.environ.setdefault(variable, str(BUILT / "standin" / name))
        self.library = ctypes.CDLL(str(LIBRARY))
        for name in ("qg_cuda_version", "qg_cuda_error"):
            getattr(self.library, name).restype = ctypes.c_char_p
        for name in ("emulator_stream", "qg_cuda_backend", "qg_cuda_linalg"):
            getattr(self.library, name).restype = ctypes.c_void_p
        self.library.emulator_waits.restype = ctypes.c_int64
        self.library.emulator_count.restype = _Counts
        assert self.library.qg_cuda_version().decode() == qg.__version__
        params, message = _Params(ctypes.sizeof(_Params), 0, 0), ctypes.create_string_buffer(512)
        self.cuda = ctypes.c_void_p()
        status = self.library.qg_cuda_open(
            ctypes.byref(self.cuda), ctypes.byref(params), message, ctypes.c_size_t(len(message))
        )
        assert status == 0, message.value.decode()
        self.workspace = torch.empty(WORKSPACE + ALIGNMENT, dtype=torch.uint8)
        start = -(-self.workspace.data_ptr() // ALIGNMENT) * ALIGNMENT
        stream = ctypes.c_void_p(self.library.emulator_stream())
        status = self.library.qg_cuda_begin(self.cuda, stream, ctypes.c_void_p(start), ctypes.c_size_t(WORKSPACE))
        assert status == 0, self.library.qg_cuda_error(self.cuda).decode()

    def use(self, on: bool = True) -> None:
        """From now on CPU tensors are worked on by the emulated kernels, or by the CPU's again."""
        tables = (getattr(self.library, f"qg_cuda_{table}")(self.cuda) for table in ("backend", "linalg"))
        torch.ops.q_galore.set_cpu_tables(*(tables if on else (0, 0)))

    def forget_counts(self) -> None:
        """Count anew."""
        self.library.emulator_reset_counts()

    def waits(self) -> int:
        """How often the host has waited for the device."""
        return self.library.emulator_waits()

    def launches(self) -> int:
        """How many kernels have been launched."""
        return self.library.emulator_count(None).launches
