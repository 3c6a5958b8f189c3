"""The CUDA kernels' library is found, compared and refused in one sentence; nothing here needs a GPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import q_galore_torch as qg
from q_galore_torch import ops
from q_galore_torch.__main__ import info

PLACE = "Q_GALORE_CUDA_LIBRARY"


def compiled(folder: Path, source: str) -> str:
    """A shared library of one C file."""
    path = folder / "library.so"
    subprocess.run(["gcc", "-shared", "-x", "c", "-", "-o", path], input=source.encode(), check=True)
    return str(path)


def test_a_missing_library_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, str(tmp_path / "nowhere.so"))
    wanted = (
        r"no CUDA kernels \(.*/nowhere.so is missing\): install it where nvcc is found, with Q_GALORE_CUDA=1, or .*"
    )
    with pytest.raises(RuntimeError, match=wanted + PLACE):
        ops.cuda_version()
    assert "nowhere.so is missing" in dict(info())["CUDA"]


def test_a_file_that_is_no_library_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.so").write_text("no library")
    monkeypatch.setenv(PLACE, str(tmp_path / "text.so"))
    with pytest.raises(RuntimeError, match=r"the CUDA kernels could not be loaded: .*text.so"):
        ops.cuda_version()


def test_a_library_of_another_version_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PLACE, compiled(tmp_path, 'const char *qg_cuda_version(void) { return "0.1"; }'))
    with pytest.raises(RuntimeError, match=rf"must be of version {qg.__version__}, got 0.1: build the package again"):
        ops.cuda_version()


def test_a_library_that_lacks_a_function_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = f'const char *qg_cuda_version(void) {{ return "{qg.__version__}"; }}'
    monkeypatch.setenv(PLACE, compiled(tmp_path, source))
    with pytest.raises(RuntimeError, match="has no qg_cuda_open: it belongs to another version of the package"):
        ops.cuda_version()


def test_importing_opens_no_library() -> None:
    program = (
        "import q_galore_torch as qg, torch; layer = torch.nn.Linear(8, 8); layer(torch.ones(1, 8)).sum().backward();"
        "qg.QGaLoreAdamW8bit(layer.parameters()).step(); assert not torch.cuda.is_initialized();"
        "assert not [line for line in open('/proc/self/maps') if 'libq_galore_cuda' in line or 'libcublas.so' in line]"
    )
    subprocess.run([sys.executable, "-c", program], check=True)
