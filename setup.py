"""Builds q_galore_torch._C (C core, CPU kernels, binding) and, where nvcc and CUDA sources are, the CUDA library.

Everything about the project itself stands in pyproject.toml. torch is not a build requirement: the build uses the torch
that is installed, so call pip with --no-build-isolation.

Environment:
    Q_GALORE_SANITIZE    sanitizers to build with, e.g. "address,undefined" (objects are kept apart from ordinary ones)
    Q_GALORE_CUDA        "0" leaves the CUDA library out, "1" insists on it, "auto" (default) builds it if it can
    Q_GALORE_CUDA_ARCHS  compute capabilities, e.g. "80 90" (default "90"); the last one is also kept as PTX
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
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext as _build_ext

ROOT = Path(__file__).resolve().parent
SANITIZE = os.environ.get("Q_GALORE_SANITIZE", "")
CUDA = os.environ.get("Q_GALORE_CUDA", "auto")
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
NVCC_FLAGS = ["-shared", "-O3", "-std=c++17", "-cudart", "static", "--threads", "2", "--compress-mode=size"]
NVCC_FLAGS += ["-fmad=false", "-ftz=false", "-prec-div=true", "-prec-sqrt=true"]
NVCC_FLAGS += ["-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off,-Wall"]
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


def cuda_include_flags() -> list[str]:
    """cuBLAS and cuSOLVER headers from NVIDIA's Python packages; the toolkit may lack them."""
    spec = importlib.util.find_spec("nvidia")
    places = [Path(p) / "cu13/include" for p in (spec.submodule_search_locations or [])] if spec else []
    return [flag for place in places if (place / "cusolverDn.h").exists() for flag in ("-isystem", str(place))]


def newest(paths: list[Path]) -> float:
    """The latest time at which one of these files changed; a file that is gone counts as changed just now."""
    return max((p.stat().st_mtime if p.exists() else float("inf") for p in paths), default=0.0)


def read_by(obj: Path) -> list[Path]:
    """The project's files that the compiler read for an object, from the .d file that -MMD left beside it."""
    rule = obj.with_suffix(".d")
    if not rule.exists():
        return [rule]
    return [Path(word) for word in rule.read_text().partition(":")[2].replace("\\\n", " ").split()]


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
        stale: list[tuple[Any, ...]] = []

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
            signature = hashlib.sha256("\n".join([*command, version]).encode()).hexdigest()
            made, note = Path(obj), Path(obj + ".flags")
            same = made.exists() and note.exists() and note.read_text() == signature
            if same and not self.force and made.stat().st_mtime > newest(read_by(made)):
                return
            stale.append((note, signature, obj, src, kind, cc_args, [*flags, *WERROR], pp))

        def compile_queued(note: Path, signature: str, *args: Any) -> None:
            note.unlink(missing_ok=True)
            compile_one(*args)
            note.write_text(signature)

        self.compiler._compile = queue_if_stale
        try:
            objects = self.compiler.compile(
                ext.sources, output_dir=self.build_temp, macros=macros, include_dirs=ext.include_dirs
            )
        finally:
            self.compiler._compile = compile_one
        jobs = max(1, int(os.environ.get("MAX_JOBS", os.cpu_count() or 1)))
        with ThreadPoolExecutor(jobs) as pool:
            # C++ first: it takes longest.
            running = [pool.submit(compile_queued, *job) for job in sorted(stale, key=lambda job: job[4] == ".c")]
            try:
                for one in running:
                    one.result()
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

        target = Path(self.get_ext_fullpath(ext.name))
        link = ["-fopenmp", "-Wl,--as-needed", *([f"-fsanitize={SANITIZE}"] if SANITIZE else ["-s"])]
        signature = hashlib.sha256("\n".join([str(target.resolve()), *objects, *link]).encode()).hexdigest()
        note = Path(self.build_temp) / "link.flags"
        made = target.stat().st_mtime if target.exists() else 0.0
        if made >= newest([Path(o) for o in objects]) and note.exists() and note.read_text() == signature:
            return
        note.unlink(missing_ok=True)
        self.compiler.link_shared_object(
            objects,
            str(target),
            libraries=ext.libraries,
            library_dirs=[str(torch / "lib")],
            extra_postargs=link,
            export_symbols=self.get_export_symbols(ext),
            build_temp=self.build_temp,
            target_lang="c++",
        )
        note.write_text(signature)

    def run(self) -> None:
        super().run()
        # Only now is self.inplace what the caller asked for: while extensions are built it is 0.
        self.build_cuda_library()

    def build_cuda_library(self) -> None:
        """libq_galore_cuda13.so beside _C, by nvcc, when csrc/cuda has sources."""
        files = sources("cuda/*.cu", "cuda/*.c")
        if CUDA == "0" or not files:
            return
        nvcc = shutil.which("nvcc") or os.environ.get("CUDA_HOME", "/usr/local/cuda") + "/bin/nvcc"
        if not os.path.exists(nvcc):
            if CUDA == "1":
                sys.exit("Q_GALORE_CUDA=1, but nvcc was found neither on PATH nor under CUDA_HOME")
            return
        library = Path(self.get_ext_fullpath("q_galore_torch._C")).parent / "libq_galore_cuda13.so"
        archs = os.environ.get("Q_GALORE_CUDA_ARCHS", "90").split()
        code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in archs]
        code.append(f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}")
        command = [nvcc, *NVCC_FLAGS, *code, "-Icsrc", *cuda_include_flags(), "-o", str(library), *files]
        signature = hashlib.sha256("\n".join(command).encode()).hexdigest()
        note = Path(self.build_temp) / "cuda.flags"
        read = newest([p for p in (ROOT / "csrc").rglob("*") if p.is_file()])
        same = note.exists() and note.read_text() == signature
        if same and library.exists() and library.stat().st_mtime > read:
            return
        note.parent.mkdir(parents=True, exist_ok=True)
        library.parent.mkdir(parents=True, exist_ok=True)
        self.spawn(command)
        note.write_text(signature)


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
