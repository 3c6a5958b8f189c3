"""Builds q_galore_torch._C (C core, CPU kernels, binding) and, where nvcc and CUDA sources are, the CUDA library.

Everything about the project itself stands in pyproject.toml. torch is not a build requirement: the build uses the torch
that is installed, so call pip with --no-build-isolation.

Environment:
    Q_GALORE_SANITIZE    sanitizers to build with, e.g. "address,undefined" (objects are kept apart from ordinary ones)
    Q_GALORE_CUDA        "0" leaves the CUDA library out, "1" insists on it, "auto" (default) builds it where nvcc is
    Q_GALORE_CUDA_ARCHS  compute capabilities (default "80 90 120"); each is also kept as PTX for GPUs between
                         and after them, which the driver compiles for (sm_100 and sm_110 from 90)
    Q_GALORE_WERROR      "1": warnings are errors (default in a git checkout), "0": they are not
    MAX_JOBS             files compiled at once (default: the number of cores)
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("Q_GALORE_SANITIZE", "")
CUDA = os.environ.get("Q_GALORE_CUDA", "auto")
OLDEST_CUDA = 13
CUDA_ARCHS = os.environ.get("Q_GALORE_CUDA_ARCHS", "80 90 120").split()
WERROR = ["-Werror"] if os.environ.get("Q_GALORE_WERROR", str(int((ROOT / ".git").exists()))) == "1" else []

# Python's own CFLAGS carry -fwrapv -DNDEBUG: the first hides signed overflow from UBSan, the second disables asserts.
if SANITIZE:
    OPTIMISE = ["-g", "-O1", "-fno-omit-frame-pointer", "-fno-wrapv", "-UNDEBUG"]
    OPTIMISE += [f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"]
else:
    OPTIMISE = ["-O3", "-g0"]
COMMON_FLAGS = [*OPTIMISE, "-fopenmp", "-fvisibility=hidden", "-Wall", "-Wextra", "-MMD"]
# -std=c11 and -ffp-contract=off: the same bits at every SIMD level (gnu11 lets gcc contract a * b + c into an FMA).
# -fno-math-errno: without it sqrtf stays a call, and Adam takes four times as long.
C_FLAGS = ["-std=c11", "-D_GNU_SOURCE", "-ffp-contract=off", "-fno-math-errno", "-Wpedantic"]
CXX_FLAGS = ["-std=c++17", "-fvisibility-inlines-hidden"]
# The same for a GPU: no contraction, IEEE division and square root, subnormal numbers kept.
NVCC_FLAGS = ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true", "-O3", "--compress-mode=size"]
NVCC_HOST_FLAGS = ["-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-Wall", "-Wextra"]
# A file named x_v3.c holds the AVX2 form of x.c, x_v4.c the AVX-512 form; both are chosen at run time. On other
# processors they are compiled without the flag and have to be empty there (#ifdef __AVX2__, __AVX512F__).
MARCH = {"_v3": ["-march=x86-64-v3"], "_v4": ["-march=x86-64-v4"]}


def sources(*patterns: str) -> list[str]:
    """The files under csrc/ that match, as sorted paths relative to this folder (setuptools wants them so)."""
    return sorted(str(p.relative_to(ROOT)) for pattern in patterns for p in (ROOT / "csrc").glob(pattern))


def torch_dir() -> Path:
    """Where torch lies, found without importing it (which takes over a second)."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        sys.exit("torch is needed to build: pip install torch, then pip install --no-build-isolation .")
    return Path(spec.origin).parent


def torch_version() -> str:
    """The installed torch's version, for which the objects are built."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def find_nvcc() -> str | None:
    """The compiler for .cu files, from PATH or the toolkit's folder."""
    under_home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc")
    return shutil.which("nvcc") or (str(under_home) if under_home.exists() else None)


def nvcc_command(nvcc: str, source: str, archs: list[str]) -> list[str]:
    """What compiles a .cu file, or a .c file that reads CUDA's headers; the caller adds what is made of it."""
    wrong = [arch for arch in archs if not re.fullmatch(r"\d{2,3}[af]?", arch)]
    if wrong or not archs:
        sys.exit(f"Q_GALORE_CUDA_ARCHS must be compute capabilities like 80 90, got {' '.join(wrong) or 'nothing'}")
    host = [*NVCC_HOST_FLAGS, *WERROR]
    if source.endswith(".c"):
        return [nvcc, "-O3", "-Icsrc", "-Xcompiler", ",".join([*host, *C_FLAGS])]
    code = [f"-gencode=arch=compute_{arch},code=[sm_{arch},compute_{arch}]" for arch in archs]
    warnings = ["-Werror", "all-warnings"] if WERROR else []
    return [nvcc, "-std=c++17", *NVCC_FLAGS, *warnings, *code, "-Icsrc", "-Xcompiler", ",".join(host)]


def newest(paths: list[Path]) -> float:
    """The latest time at which one of these files changed; a file that is gone counts as changed just now."""
    return max((p.stat().st_mtime if p.exists() else float("inf") for p in paths), default=0.0)


def read_by(obj: Path) -> list[Path]:
    """The project's files that the compiler read for an object, from the .d file that -MMD left beside it."""
    rule = obj.with_suffix(".d")
    if not rule.exists():
        return [rule]
    return [Path(word) for word in rule.read_text().partition(":")[2].replace("\\\n", " ").split()]


def up_to_date(made: Path, note: Path, signature: str, read: list[Path]) -> bool:
    """Whether a file was made by this command (its note says so) from files that have not changed since."""
    same = made.exists() and note.exists() and note.read_text() == signature
    return same and made.stat().st_mtime > newest(read)


def digest(command: list[str]) -> str:
    """A command's signature, kept beside what it made."""
    return hashlib.sha256("\n".join(command).encode()).hexdigest()


def run_noted(note: Path, signature: str, job: Callable[[], None]) -> None:
    """Do a job and note its signature; a job that fails leaves no note."""
    note.unlink(missing_ok=True)
    job()
    note.write_text(signature)


def run_all(jobs: list[Callable[[], None]]) -> None:
    """Several jobs at once, in this order; the first failure is raised."""
    with ThreadPoolExecutor(max(1, int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))) as pool:
        running = [pool.submit(job) for job in jobs]
        try:
            for one in running:
                one.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


class build_ext(_build_ext):
    """Compiles only what changed, several files at once, with flags by language and by file-name suffix."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # pip gives every editable install a new temporary folder; objects outlive it here.
        if SANITIZE:
            self.build_temp = str(ROOT / "build" / ("obj-" + re.sub(r"\W+", "-", SANITIZE)))
        else:
            self.build_temp = str(ROOT / "build" / "obj")

    def build_extension(self, ext: Extension) -> None:
        if not any(s.endswith(".cpp") for s in ext.sources):
            sys.exit("csrc/ holds no binding: this source tree is incomplete")
        torch = torch_dir()
        includes = [torch / "include", torch / "include/torch/csrc/api/include"]
        system = [flag for place in includes for flag in ("-isystem", str(place))]
        macros: list[Any] = [("QG_PACKAGE_VERSION", f'"{self.distribution.get_version()}"'), *ext.define_macros]
        compile_one = self.compiler._compile
        stale: list[tuple[str, Callable[[], None]]] = []

        def queue_if_stale(obj: str, src: str, kind: str, cc_args: list[str], extra: list[str], pp: list[str]) -> None:
            stem = Path(src).stem
            flags = [*extra, *COMMON_FLAGS]
            if kind == ".c":
                flags += C_FLAGS
                if platform.machine() in ("x86_64", "AMD64"):
                    flags += MARCH.get(stem[stem.rfind("_") :] if "_" in stem else "", [])
            else:
                flags += [*CXX_FLAGS, *system]
            command = [*self.compiler.compiler_so, *cc_args, *pp, *flags]
            version = torch_version() if kind != ".c" else ""
            signature, note = digest([*command, version]), Path(obj + ".flags")
            if self.force or not up_to_date(Path(obj), note, signature, read_by(Path(obj))):
                job = partial(compile_one, obj, src, kind, cc_args, [*flags, *WERROR], pp)
                stale.append((kind, partial(run_noted, note, signature, job)))

        self.compiler._compile = queue_if_stale
        try:
            objects = self.compiler.compile(
                ext.sources, output_dir=self.build_temp, macros=macros, include_dirs=ext.include_dirs
            )
        finally:
            self.compiler._compile = compile_one
        # C++ first: it takes longest.
        run_all([job for _, job in sorted(stale, key=lambda one: one[0] == ".c")])

        target = Path(self.get_ext_fullpath(ext.name))
        link = ["-fopenmp", "-Wl,--as-needed", *([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"])]
        signature = digest([str(target.resolve()), *objects, *link])
        note = Path(self.build_temp) / "link.flags"
        if up_to_date(target, note, signature, [Path(o) for o in objects]):
            return
        job = partial(
            self.compiler.link_shared_object,
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=[str(torch / "lib")],
            extra_postargs=link,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )
        run_noted(note, signature, job)

    def run(self) -> None:
        super().run()
        # Only now is self.inplace what the caller asked for: while extensions are built it is 0.
        self.build_cuda_library()

    def build_cuda_library(self) -> None:
        """libq_galore_cuda13.so beside _C, by nvcc, when csrc/cuda has sources; what it refuses fails the build."""
        files = sources("cuda/*.cu", "cuda/*.c")
        if CUDA == "0" or not files:
            return
        nvcc = find_nvcc()
        if nvcc is None:
            if CUDA == "1":
                sys.exit("Q_GALORE_CUDA=1, but nvcc was found neither on PATH nor under CUDA_HOME")
            return
        version = subprocess.run([nvcc, "--version"], check=True, capture_output=True, text=True).stdout
        release = re.search(r"release (\d+)\.", version)
        if release is not None and int(release[1]) < OLDEST_CUDA:
            sentence = f"the CUDA library needs nvcc of CUDA {OLDEST_CUDA} or newer, {nvcc} is of CUDA {release[1]}"
            if CUDA == "1":
                sys.exit(f"Q_GALORE_CUDA=1, but {sentence}")
            print(f"warning: {sentence}: the library is left out", file=sys.stderr)
            return
        objects = [Path(self.build_temp) / f"{file}.o" for file in files]
        stale = []
        for file, obj in zip(files, objects, strict=True):
            command = nvcc_command(nvcc, file, CUDA_ARCHS)
            signature, note = digest([*command, version]), Path(f"{obj}.flags")
            if self.force or not up_to_date(obj, note, signature, read_by(obj)):
                obj.parent.mkdir(parents=True, exist_ok=True)
                command += ["-MMD", "-MF", str(obj.with_suffix(".d")), "-c", "-o", str(obj), file]
                stale.append(partial(run_noted, note, signature, partial(self.spawn, command)))
        run_all(stale)

        library = Path(self.get_ext_fullpath("q_galore_torch._C")).parent / "libq_galore_cuda13.so"
        # A static runtime needs no CUDA toolkit where the library runs; its names stay inside.
        link = [
            nvcc,
            "-shared",
            "-nodlink",
            "-cudart",
            "static",
            "-Xlinker",
            "--exclude-libs=ALL,-s",
            "-o",
            str(library),
        ]
        link += [str(obj) for obj in objects]
        signature, note = digest([*link, str(library.resolve())]), Path(self.build_temp) / "cuda.flags"
        if not up_to_date(library, note, signature, objects):
            library.parent.mkdir(parents=True, exist_ok=True)
            run_noted(note, signature, partial(self.spawn, link))


# The tests read flags and commands from here.
if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "q_galore_torch._C",
                sources("core/*.c", "cpu/*.c", "binding/*.cpp"),
                include_dirs=["csrc"],
                libraries=["torch_cpu"],
                define_macros=[("Py_LIMITED_API", "0x030A0000"), ("TORCH_TARGET_VERSION", "0x020a000000000000")],
                py_limited_api=True,
            )
        ],
        cmdclass={"build_ext": build_ext},
        options={"bdist_wheel": {"py_limited_api": "cp310"}},
    )
