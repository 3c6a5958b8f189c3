"""The compiled files are what the numerics need: no contracted multiply-add, the SIMD level that the name says."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OBJECTS = ROOT / "build" / "obj" / "csrc"
FMA = re.compile(r"\bvf(?:n?m)(?:add|sub|addsub|subadd)\w*\b")
TORCH_LIBRARIES = {"libtorch_cpu.so"}
SYSTEM_LIBRARIES = re.compile(r"lib(gomp|stdc\+\+|gcc_s|c|m)\.so\.\d+|ld-linux-x86-64\.so\.2")

needs_objdump = pytest.mark.skipif(shutil.which("objdump") is None, reason="objdump is not installed")


def _run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _disassembly(path: Path) -> str:
    return _run("objdump", "-d", "--no-show-raw-insn", str(path))


def _objects(*patterns: str) -> list[Path]:
    found = sorted(p for pattern in patterns for p in OBJECTS.glob(pattern))
    if not found:
        pytest.skip("no objects under build/obj: the extension was not built in this checkout (make build)")
    return found


@needs_objdump
def test_objects_hold_no_fused_multiply_add() -> None:
    """Element-wise paths give the same bits at every SIMD level only if no a * b + c is rounded once."""
    found = {}
    for path in _objects("core/*.o", "cpu/*.o"):
        used = sorted(set(FMA.findall(_disassembly(path))))
        if used:
            found[path.name] = used
    assert not found


@needs_objdump
def test_fma_search_finds_a_contraction(tmp_path: Path) -> None:
    """The search above can fail: with gcc's default contraction the same loop is fused."""
    source = tmp_path / "fused.c"
    source.write_text("void f(float *a, float *b, int n) { for (int i = 0; i < n; i++) a[i] = a[i] * b[i] + 1.0f; }")
    plain, fused = tmp_path / "plain.o", tmp_path / "fused.o"
    command = ["gcc", "-O3", "-march=x86-64-v3", "-c", str(source)]
    if shutil.which("gcc") is None or subprocess.run([*command, "-o", str(fused)], capture_output=True).returncode:
        pytest.skip("no gcc that compiles for x86-64-v3")
    _run(*command, "-std=c11", "-ffp-contract=off", "-o", str(plain))
    assert FMA.search(_disassembly(fused))
    assert not FMA.search(_disassembly(plain))


@needs_objdump
@pytest.mark.parametrize(("suffix", "register"), [("_v3", "%ymm"), ("_v4", "%zmm")])
def test_simd_objects_use_their_registers(suffix: str, register: str) -> None:
    """x_v3.c is compiled for AVX2, x_v4.c for AVX-512; the plain files use neither."""
    paths = [p for p in _objects("cpu/*.o") if p.stem.endswith(suffix)]
    assert paths, f"csrc/cpu has no *{suffix}.c"
    for path in paths:
        assert register in _disassembly(path), path.name


@needs_objdump
def test_baseline_objects_use_no_avx() -> None:
    """Code that any x86-64 processor reaches must run on every one of them (clones and targets are marked by name)."""
    for path in _objects("core/*.o", "cpu/*.o"):
        if path.stem.endswith(("_v3", "_v4")):
            continue
        for function in re.split(r"\n(?=[0-9a-f]+ <)", _disassembly(path)):
            header = function.lstrip().split("\n", 1)[0]
            if re.search(r"arch_x86_64_v|avx", header):
                continue
            assert not re.search(r"%[yz]mm", function), f"{path.name}: {header}"


def _extension() -> Path:
    import q_galore_torch._C

    assert q_galore_torch._C.__file__ is not None
    return Path(q_galore_torch._C.__file__)


@needs_objdump
def test_extension_links_only_what_every_torch_has() -> None:
    """libtorch, libc10 or libtorch_python would tie the wheel to one torch or one Python; a path, to one machine."""
    dynamic = _run("objdump", "-p", str(_extension()))
    needed = set(re.findall(r"NEEDED\s+(\S+)", dynamic))
    extra = {name for name in needed - TORCH_LIBRARIES if not SYSTEM_LIBRARIES.fullmatch(name)}
    sanitizers = {name for name in extra if re.match(r"lib(asan|ubsan)\.so", name)}
    assert needed >= TORCH_LIBRARIES
    assert extra == sanitizers
    assert not re.search(r"\b(RPATH|RUNPATH)\b", dynamic)


@needs_objdump
def test_extension_exports_only_its_init_function() -> None:
    """Exported qg_ names would clash with another copy of the library in the same process."""
    table = _run("objdump", "-T", "-C", str(_extension()))
    exported = [line.split()[-1] for line in table.splitlines() if re.search(r"^[0-9a-f]+ g .*\.text", line)]
    assert "PyInit__C" in exported
    assert not [name for name in exported if name.startswith("qg_")]
