"""What each CUDA kernel takes of a GPU: registers, stack, spills and shared memory, as ptxas counts them.

    python csrc/tests/registers.py            compare with csrc/cuda/registers.txt
    python csrc/tests/registers.py --write    write that file

Another nvcc may count registers differently, so the file names the one that wrote it, and only that one is held to it.
Spills are refused whoever compiles: a kernel that spills moves more bytes than its page in docs/kernels says.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
TABLE = ROOT / "csrc" / "cuda" / "registers.txt"
ARCHS = ("80", "90", "120")

sys.path.insert(0, str(ROOT))
import setup as build  # noqa: E402  (the flags of the library; it is not an installed module)


class Kernel(NamedTuple):
    """One kernel compiled for one architecture; the last four are bytes."""

    file: str
    name: str
    arch: str
    registers: int
    stack: int
    spilled: int
    shared: int


def nvcc_version(nvcc: str) -> str:
    """For instance "13.0.88"."""
    printed = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
    found = re.search(r"V(\d+\.\d+\.\d+)", printed)
    if found is None:
        raise RuntimeError(f"{nvcc} --version names no version: {printed!r}")
    return found[1]


def plain_name(symbol: str) -> str:
    """The kernel's name in the source: _Z4adam4list is adam."""
    mangled = re.match(r"_ZL?(\d+)(.+)", symbol)
    return mangled[2][: int(mangled[1])] if mangled else symbol


def read_ptxas(file: str, arch: str, printed: str) -> list[Kernel]:
    """The kernels that `ptxas -v` tells of; functions that one calls count as its own."""
    kernels = []
    for part in re.split(r"Compiling entry function ", printed)[1:]:
        symbol = re.match(r"'(\w+)'", part)
        used = re.search(r"Used (\d+) registers(.*)", part)
        frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part)
        if symbol is None or used is None or not frames:
            raise RuntimeError(f"{file}: ptxas -v is not understood: {part!r}")
        shared = re.search(r"(\d+) bytes smem", used[2])
        stack = max(int(frame[0]) for frame in frames)
        spilled = sum(int(frame[1]) + int(frame[2]) for frame in frames)
        bytes_shared = int(shared[1]) if shared else 0
        kernels.append(Kernel(file, plain_name(symbol[1]), arch, int(used[1]), stack, spilled, bytes_shared))
    return kernels


def compile_cubin(nvcc: str, source: str, arch: str, folder: Path) -> list[Kernel]:
    """One file for one architecture, as the library compiles it; the code stays in folder/adam8.sm_90.cubin."""
    command = [word for word in build.nvcc_command(nvcc, source, [arch]) if "-gencode" not in word]
    out = folder / f"{Path(source).stem}.sm_{arch}.cubin"
    command += [f"-arch=sm_{arch}", "-Xptxas", "-v", "-cubin", "-o", str(out), source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvcc refuses {source} for sm_{arch}:\n{done.stdout}{done.stderr}")
    return read_ptxas(Path(source).name, arch, done.stdout + done.stderr)


def measure(nvcc: str, folder: Path) -> list[Kernel]:
    """Every kernel of csrc/cuda for every architecture, in order."""
    jobs = [(source, arch) for source in build.sources("cuda/*.cu") for arch in ARCHS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lists = list(pool.map(lambda job: compile_cubin(nvcc, *job, folder), jobs))
    return sorted((kernel for one in lists for kernel in one), key=lambda k: (k.file, k.name, int(k.arch)))


def render(version: str, kernels: list[Kernel]) -> str:
    """The text of the table."""
    head = f"# nvcc {version}; made by csrc/tests/registers.py --write. Stack, spilled and shared are bytes.\n"
    line = "{:<14} {:<28} {:<7} {:>9} {:>6} {:>8} {:>7}\n"
    lines = [line.format(k.file, k.name, f"sm_{k.arch}", *k[3:]) for k in kernels]
    return head + line.format("file", "kernel", "arch", "registers", "stack", "spilled", "shared") + "".join(lines)


def complaints(version: str, kernels: list[Kernel], table: str) -> list[str]:
    """What is wrong with these kernels, one sentence each."""
    wrong = [f"{k.file}: {k.name} spills {k.spilled} bytes on sm_{k.arch}" for k in kernels if k.spilled]
    if table.startswith(f"# nvcc {version};"):
        made, committed = render(version, kernels).splitlines()[2:], table.splitlines()[2:]
        wrong += [f"not in the table: {line}" for line in made if line not in committed]
        wrong += [f"in the table alone: {line}" for line in committed if line not in made]
    return wrong


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="write csrc/cuda/registers.txt")
    arguments = parser.parse_args(words)
    nvcc = build.find_nvcc()
    if nvcc is None:
        print("nvcc was found neither on PATH nor under CUDA_HOME", file=sys.stderr)
        return 2
    version = nvcc_version(nvcc)
    with tempfile.TemporaryDirectory() as folder:
        kernels = measure(nvcc, Path(folder))
    if arguments.write:
        TABLE.write_text(render(version, kernels))
    wrong = complaints(version, kernels, TABLE.read_text())
    print("\n".join(wrong) or f"{len(kernels)} kernels as in csrc/cuda/registers.txt, none spills")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
