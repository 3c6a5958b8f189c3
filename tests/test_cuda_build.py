"""The CUDA library as far as a machine without a GPU can judge it: the build, registers, SASS, PTX, exported names."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from setuptools import Distribution

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = ROOT / "q_galore_torch" / "libq_galore_cuda13.so"
sys.path.insert(0, str(ROOT / "csrc" / "tests"))
import registers  # noqa: E402

build = registers.build
NVCC = build.find_nvcc()
# Kernels that a step spends its time in: their file, and the fewest 128-bit loads and stores in their code. A share of
# 16 elements takes one for codes, two for 16-bit numbers, four for float32; nvcc has been seen to take stores apart.
HOT_KERNELS = {
    "update_kernel": ("update", 19, 9),
    "adam_kernel": ("adam8", 22, 22),
    "adam_update_kernel": ("adam8", 23, 19),
    "decode_units": ("projector", 2, 18),
    "int8_dequantize_kernel": ("int8", 1, 6),
    "cast_units": ("cast", 8, 8),
    "absmax_units": ("cast", 6, 0),
}

needs_nvcc = pytest.mark.skipif(NVCC is None, reason="nvcc is not installed")
needs_kernels = pytest.mark.skipif(not build.sources("cuda/*.cu"), reason="csrc/cuda holds no kernels")


def _tool(name: str) -> str:
    """A program of NVIDIA's, from PATH or from its Python package."""
    spec = importlib.util.find_spec("nvidia")
    folders = [str(Path(place) / "cu13/bin") for place in (spec.submodule_search_locations or [])] if spec else []
    found = shutil.which(name, path=os.pathsep.join([os.environ["PATH"], *folders]))
    if found is None:
        pytest.skip(f"{name} is not installed (it is in the test extra)")
    return found


def _run(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done.stdout


# ---------------------------------------------------------------- what ptxas says


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[registers.Kernel], Path]:
    """Every kernel for every architecture, and the folder of their code."""
    folder = tmp_path_factory.mktemp("cubins")
    assert NVCC is not None
    return registers.measure(NVCC, folder), folder


@needs_nvcc
@needs_kernels
def test_kernels_take_what_the_table_says_and_none_spills(compiled: tuple[list[registers.Kernel], Path]) -> None:
    assert NVCC is not None
    kernels, _ = compiled
    assert {k.file for k in kernels} == {Path(source).name for source in build.sources("cuda/*.cu")}
    assert registers.complaints(registers.nvcc_version(NVCC), kernels, registers.TABLE.read_text()) == []


@needs_nvcc
def test_a_spill_is_found(tmp_path: Path) -> None:
    """What reads ptxas must be able to fail: sixty-four running sums do not fit into 32 registers."""
    source = tmp_path / "spilling.cu"
    source.write_text("""
static __global__ void sums(float *a) {
    float x[64];
    for (int i = 0; i < 64; i++) x[i] = a[i * 64 + threadIdx.x];
    __syncthreads();
    for (int i = 0; i < 64; i++) a[i * 64 + 1 + threadIdx.x] = x[i] * x[63 - i];
}
void launch(float *a) { sums<<<1, 32>>>(a); }
""")
    command = ["-arch=sm_90", "-maxrregcount=32", "-Xptxas", "-v", "-cubin", "-o", tmp_path / "x.cubin", source]
    done = subprocess.run([str(NVCC), *map(str, command)], capture_output=True, text=True)
    (kernel,) = registers.read_ptxas("spilling.cu", "90", done.stdout + done.stderr)
    assert (kernel.name, kernel.registers) == ("sums", 32)
    assert kernel.spilled > 0
    (complaint,) = registers.complaints("0", [kernel], "")
    assert complaint == f"spilling.cu: sums spills {kernel.spilled} bytes on sm_90"


def test_a_table_of_the_same_nvcc_binds_and_another_does_not() -> None:
    kernel = registers.Kernel("x.cu", "x", "90", 40, 0, 0, 1024)
    table = registers.render("13.0.88", [kernel])
    assert registers.complaints("13.0.88", [kernel], table) == []
    grown = kernel._replace(registers=41)
    assert len(registers.complaints("13.0.88", [grown], table)) == 2
    assert registers.complaints("13.1.0", [grown], table) == []


# ---------------------------------------------------------------- machine code


def _sass(cubin: Path) -> dict[str, str]:
    """The machine code of each kernel of a .cubin file."""
    printed = _run(_tool("nvdisasm"), "-c", cubin)
    parts = re.split(r"//-+ \.text\.(\w+)\s+-+", printed)
    return {registers.plain_name(symbol): code for symbol, code in zip(parts[1::2], parts[2::2], strict=True)}


@needs_nvcc
@pytest.mark.parametrize("arch", registers.ARCHS)
@pytest.mark.parametrize("kernel", sorted(HOT_KERNELS))
def test_hot_kernels_move_128_bits_at_a_time(
    kernel: str, arch: str, compiled: tuple[list[registers.Kernel], Path]
) -> None:
    file, loads, stores = HOT_KERNELS[kernel]
    code = _sass(compiled[1] / f"{file}.sm_{arch}.cubin")[kernel]
    assert len(re.findall(r"\bLDG\.E\.128\b", code)) >= loads
    assert len(re.findall(r"\bSTG\.E\.128\b", code)) >= stores


INEXACT = re.compile(r"\b(?:fma\.\w+\.f(?:32|64)|\w+(?:\.\w+)*\.ftz\S*|\w+\.(?:approx|full)\S*)")


def _ptx(source: str, folder: Path) -> str:
    assert NVCC is not None
    command = [word for word in build.nvcc_command(NVCC, source, ["90"]) if "-gencode" not in word]
    out = folder / f"{Path(source).stem}.ptx"
    _run(*command, "-arch=compute_90", "-ptx", "-o", out, source)
    return out.read_text()


@needs_nvcc
@pytest.mark.parametrize("source", build.sources("cuda/*.cu"))
def test_kernels_round_as_the_processor_does(source: str, tmp_path: Path) -> None:
    """No contracted multiply-add, no flushed subnormal number, no approximate division or root."""
    assert sorted(set(INEXACT.findall(_ptx(source, tmp_path)))) == []


@needs_nvcc
def test_inexact_instructions_are_found(tmp_path: Path) -> None:
    """The search above can fail: the same kernel with nvcc's fast mathematics."""
    source = tmp_path / "fast.cu"
    source.write_text("extern __global__ void f(float *a) { a[0] = a[1] * a[2] + a[3] / sqrtf(a[4]); }\n")
    assert INEXACT.findall(_ptx(str(source), tmp_path)) == []
    assert NVCC is not None
    _run(NVCC, "--use_fast_math", "-arch=compute_90", "-ptx", "-o", tmp_path / "fast.ptx", source)
    found = INEXACT.findall((tmp_path / "fast.ptx").read_text())
    assert [name for name in found if name.startswith("fma.rn")]
    assert [name for name in found if ".approx.ftz.f32" in name]


def test_every_object_has_its_page() -> None:
    pages = ROOT / "docs" / "kernels"
    overview = (pages / "README.md").read_text()
    for source in build.sources("cuda/*.cu"):
        name = Path(source).stem
        assert f"({name}.md)" in overview, name
        assert f"csrc/cuda/{name}.cu" in (pages / f"{name}.md").read_text(), name


# ---------------------------------------------------------------- the library


def _library() -> Path:
    if not LIBRARY.exists():
        pytest.skip("libq_galore_cuda13.so was not built in this checkout")
    return LIBRARY


def test_library_exports_what_the_header_declares() -> None:
    """And nothing of the CUDA runtime that it holds."""
    if shutil.which("nm") is None:
        pytest.skip("nm is not installed")
    header = (ROOT / "csrc" / "q_galore.h").read_text()
    declared = set(re.findall(r"\b(qg_cuda_\w+)\(", header))
    printed = _run("nm", "-D", "--defined-only", _library())
    assert {line.split()[-1] for line in printed.splitlines()} == declared


def test_library_needs_no_cuda_library_to_load() -> None:
    """cuBLAS and cuSOLVER are opened by name when they are needed, the runtime is inside."""
    if shutil.which("objdump") is None:
        pytest.skip("objdump is not installed")
    needed = re.findall(r"NEEDED\s+(\S+)", _run("objdump", "-p", _library()))
    assert not [name for name in needed if re.match(r"lib(cu|nv)", name)]


def test_library_holds_code_for_each_architecture() -> None:
    printed = _run(_tool("cuobjdump"), "-lelf", "-lptx", _library())
    archs = os.environ.get("Q_GALORE_CUDA_ARCHS", " ".join(registers.ARCHS)).split()
    assert set(re.findall(r"\.sm_(\d+)\.cubin", printed)) == set(archs)
    assert set(re.findall(r"\.sm_(\d+)\.ptx", printed)) == set(archs), (
        "GPUs between two of them run the older one's PTX"
    )


# ---------------------------------------------------------------- how it is built

# Writes the object and its dependencies like nvcc, and what it was asked to do to a log.
FAKE_NVCC = """#!/bin/sh
[ "$1" = --version ] && echo 'release 13.0, V13.0.88' && exit 0
while [ $# -gt 0 ]; do
    case "$1" in -o) out=$2 ;; -MF) rule=$2 ;; csrc/*) source=$1 ;; esac
    shift
done
[ -n "$rule" ] && echo "$out : $source" > "$rule"
echo "${source:-link}" >> "$0.log"
echo made > "$out"
"""


@pytest.fixture
def builder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str, str], list[str]]:
    """Builds the library of two sources with a script for nvcc; returns what it compiled."""
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    for name in ("a.cu", "b.c"):
        (folder / name).touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(build, "ROOT", tmp_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}/bin{os.pathsep}/usr/bin")

    def run(mode: str, nvcc: str) -> list[str]:
        monkeypatch.setattr(build, "CUDA", mode)
        script, log = tmp_path / "nvcc", tmp_path / "nvcc.log"
        script.unlink(missing_ok=True)
        log.unlink(missing_ok=True)
        if nvcc:
            script.write_text(nvcc)
            script.chmod(0o755)
        command = build.build_ext(Distribution({"name": "x", "ext_modules": []}))
        command.initialize_options()
        command.finalize_options()
        command.force, command.build_temp = False, str(tmp_path / "obj")
        monkeypatch.setattr(command, "get_ext_fullpath", lambda name: str(tmp_path / "package" / "_C.so"))
        command.build_cuda_library()
        return sorted(log.read_text().split()) if log.exists() else []

    return run


def test_build_compiles_only_what_changed(builder: Callable[[str, str], list[str]], tmp_path: Path) -> None:
    assert builder("auto", FAKE_NVCC) == ["csrc/cuda/a.cu", "csrc/cuda/b.c", "link"]
    assert (tmp_path / "package" / "libq_galore_cuda13.so").exists()
    assert builder("auto", FAKE_NVCC) == []
    (tmp_path / "csrc/cuda/a.cu").touch()
    assert builder("1", FAKE_NVCC) == ["csrc/cuda/a.cu", "link"]
    assert builder("auto", FAKE_NVCC.replace("13.0.88", "13.1.0")) == ["csrc/cuda/a.cu", "csrc/cuda/b.c", "link"]


def test_build_without_nvcc(builder: Callable[[str, str], list[str]], tmp_path: Path) -> None:
    if shutil.which("nvcc", path="/bin:/usr/bin") is not None:
        pytest.skip("nvcc lies in a system folder")
    assert builder("auto", "") == []
    assert builder("0", FAKE_NVCC) == []
    with pytest.raises(SystemExit, match="Q_GALORE_CUDA=1, but nvcc was found neither on PATH nor under CUDA_HOME"):
        builder("1", "")
    assert not (tmp_path / "package").exists()


def test_build_leaves_an_older_nvcc_alone(
    builder: Callable[[str, str], list[str]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """Of CUDA 12, which knows neither all flags nor sm_120: the build of the whole package failed at it."""
    older = FAKE_NVCC.replace("13.0, V13.0.88", "12.4, V12.4.131")
    assert builder("auto", older) == []
    said = f"the CUDA library needs nvcc of CUDA 13 or newer, {tmp_path / 'nvcc'} is of CUDA 12"
    assert f"warning: {said}: the library is left out" in capsys.readouterr().err
    with pytest.raises(SystemExit, match=f"Q_GALORE_CUDA=1, but {said}"):
        builder("1", older)
    assert not (tmp_path / "package").exists()


def test_build_fails_where_nvcc_does(
    builder: Callable[[str, str], list[str]], capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """The library is never left out in silence: nvcc's words are shown, and nothing is taken for built."""
    failing = '#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "a.cu(7): error: expected a ;" >&2\nexit 2\n'
    with pytest.raises(Exception, match="nvcc.* failed with exit code 2"):
        builder("auto", failing)
    assert "a.cu(7): error: expected a ;" in capfd.readouterr().err
    assert not (tmp_path / "package").exists()
    assert "link" in builder("auto", FAKE_NVCC)


def test_build_refuses_other_words_for_architectures() -> None:
    with pytest.raises(SystemExit, match="Q_GALORE_CUDA_ARCHS must be compute capabilities like 80 90, got 9.0 sm_80"):
        build.nvcc_command("nvcc", "csrc/cuda/a.cu", ["90", "9.0", "sm_80"])
