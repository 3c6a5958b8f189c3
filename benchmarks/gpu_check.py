"""Everything that needs a GPU, in one command without network, meant to take less than eight minutes: make gpu-check.

    python benchmarks/gpu_check.py [--parts build tests sanitizers benchmarks]

build       the extension and the CUDA library, for this GPU alone
tests       pytest with --device cuda: ops, optimizer, layer, subspaces, steps that wait for nothing, side streams
sanitizers  csrc/tests/test_cuda_calls.c, every call of the library, under compute-sanitizer's four tools
benchmarks  benchmarks/bench_gpu.py, which writes benchmarks/results/gpu.json

Each part says whether it passed; the next one runs all the same. Needs torch >= 2.10 with CUDA, pytest and hypothesis
in this Python, and nvcc and compute-sanitizer on the path (or under CUDA_HOME). Exit status: 0 all passed, 1 something
failed or torch is missing, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    import torch
except ImportError as error:
    sys.exit(f"gpu-check needs a Python with torch, name it: make gpu-check PYTHON=python3 ({sys.executable}: {error})")

ROOT = Path(__file__).resolve().parent.parent
BUILD = ROOT / "build" / "gpu"
PACKAGE = ROOT / "q_galore_torch"
TESTS = """gpu int8 projector dynamic8 noise adam8 galore_step subspace optimizer optimizer_options optimizer_rules
           moments layer layer_leaf layer_convert""".split()
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


class Failed(Exception):
    """A part did not pass; the message is its sentence."""


def run(words: list[object], seconds: float, **environment: str) -> None:
    """A command in the project's folder that has to succeed in time."""
    command = [str(word) for word in words]
    shown = " ".join(Path(word).name if word.startswith("/") else word for word in command[:3])
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    try:
        done = subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path, **environment}, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise Failed(f"{shown} took more than {seconds:.0f} s") from None
    if done.returncode:
        raise Failed(f"{shown} ended with status {done.returncode}")


def tool(name: str) -> str:
    """A program of the CUDA toolkit."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    found = shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), str(home / "bin")]))
    if found is None:
        raise Failed(f"{name} was found neither on PATH nor in {home / 'bin'}")
    return found


def build() -> None:
    major, minor = torch.cuda.get_device_capability()
    words = [sys.executable, "setup.py", "--quiet", "build_ext", "--inplace"]
    # A warning of a compiler newer than ours stops nothing.
    run(words, 240, Q_GALORE_CUDA="1", Q_GALORE_CUDA_ARCHS=f"{major}{minor}", Q_GALORE_WERROR="0")


def tests() -> None:
    files = [f"tests/test_{name}.py" for name in TESTS]
    run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", "cuda", *files], 240)


def compile_calls() -> Path:
    """test_cuda_calls with the C library inside, beside the CUDA library that was built."""
    library, program = BUILD / "libq_galore.a", BUILD / "test_cuda_calls"
    run(["make", "-s", "-j", "-C", "examples/c", f"BUILD={BUILD}", library], 120)
    words: list[object] = [tool("nvcc"), "-O1", "-Icsrc", "-Xcompiler", "-D_GNU_SOURCE,-fopenmp"]
    words += ["-Xlinker", f"-rpath={PACKAGE}", "-o", program]
    words += [f"csrc/tests/{name}.c" for name in ("test_cuda_calls", "harness", "gemm", "reference")]
    words += [library, PACKAGE / "libq_galore_cuda13.so", "-lm"]
    run(words, 120)
    return program


def library_paths() -> str:
    """Where cuBLAS and cuSOLVER of torch's own packages lie, for a program without Python."""
    site = Path(torch.__file__).parents[1] / "nvidia"
    places = sorted({str(lib.parent) for lib in site.glob("**/libcu*.so.*")}) if site.exists() else []
    return os.pathsep.join(filter(None, [*places, os.environ.get("LD_LIBRARY_PATH")]))


def sanitizers() -> None:
    program, paths = compile_calls(), library_paths()
    run([program], 60, LD_LIBRARY_PATH=paths)
    sanitizer, failed = tool("compute-sanitizer"), []
    for name in TOOLS:
        print(f"-- {name}", flush=True)
        words: list[object] = [sanitizer, "--tool", name, "--error-exitcode", "9"]
        if name == "racecheck":  # slow in NVIDIA's own kernels; initcheck has to see what those write
            words += ["--kernel-name-exclude", "regex=.*(gemm|gemv|nvjet|xmma|cutlass|cublas|cusolver|splitK).*"]
        try:
            run([*words, program], 90, LD_LIBRARY_PATH=paths)
        except Failed as failure:
            failed.append(f"{name}: {failure}")
    if failed:
        raise Failed("; ".join(failed))


def benchmarks() -> None:
    run([sys.executable, "benchmarks/bench_gpu.py"], 240)


PARTS: dict[str, Callable[[], None]] = {
    "build": build,
    "tests": tests,
    "sanitizers": sanitizers,
    "benchmarks": benchmarks,
}


def check(names: list[str]) -> int:
    """Run these parts, then say of each whether it passed."""
    lines, failures = [], 0
    for name in names:
        print(f"\n==> {name}", flush=True)
        start = time.monotonic()
        try:
            PARTS[name]()
            verdict = "passed"
        except Failed as failure:
            verdict = f"FAILED: {failure}"
            failures += 1
        lines.append(f"{name:12s} {time.monotonic() - start:5.0f} s  {verdict}")
    print("\n==> summary", *lines, sep="\n")
    return 1 if failures else 0


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        print(f"gpu-check needs a GPU, and torch {torch.__version__} finds none that it can use", file=sys.stderr)
        return 2
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, {torch.cuda.get_device_name()}")
    return check(arguments.parts)


if __name__ == "__main__":
    sys.exit(main())
