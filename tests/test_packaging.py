"""The way to a user: sdist, wheel, import in a clean environment, the commands of the README, ``info``."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from email.message import Message
from email.parser import Parser
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import q_galore_torch
from q_galore_torch import __main__ as command_line
from q_galore_torch import ops

ROOT = Path(__file__).resolve().parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]  # type: ignore[index]
NOT_SOURCE = shutil.ignore_patterns(
    ".git", ".venv*", "build", "dist", "*.egg-info", "*.so", "*.o", "__pycache__", ".*_cache", ".hypothesis", "runs"
)

# Under `make sanitize` the runtimes are preloaded into every child, the compiler included.
pytestmark = pytest.mark.skipif("libasan" in os.environ.get("LD_PRELOAD", ""), reason="packaging, under sanitizers")
# What setup.py takes for a reason to build the CUDA library.
HAS_CUDA_BUILD = os.environ.get("Q_GALORE_CUDA", "auto") != "0" and (
    shutil.which("nvcc") is not None or Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"), "bin/nvcc").exists()
)
needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="g++ is not installed")


def _run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    """Standard output of a command that has to succeed; what it printed is shown when it does not."""
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env={**os.environ, **(env or {})},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=300,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this tree without anything that was built."""
    folder = tmp_path_factory.mktemp("sdist")
    shutil.copytree(ROOT, folder / "tree", ignore=NOT_SOURCE)
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(folder)!r})"
    _run(sys.executable, "-c", code, cwd=folder / "tree")
    (archive,) = folder.glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def unpacked(sdist: Path) -> Path:
    """The folder that the sdist unpacks to."""
    with tarfile.open(sdist) as archive:
        archive.extractall(sdist.parent)
    return sdist.parent / f"q_galore_torch-{VERSION}"


@pytest.fixture(scope="module")
def wheel(unpacked: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from the unpacked sdist."""
    folder = tmp_path_factory.mktemp("wheel")
    options = ["--quiet", "--disable-pip-version-check", "--no-build-isolation", "--no-deps", "--no-index"]
    # One architecture: nvcc, where it is, takes a multiple of the time for more.
    environment = {"Q_GALORE_CUDA_ARCHS": "90"}
    _run(sys.executable, "-m", "pip", "wheel", *options, "--wheel-dir", folder, ".", cwd=unpacked, env=environment)
    (file,) = folder.glob("*.whl")
    return file


@pytest.fixture(scope="module")
def clean_python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that holds the wheel alone; torch comes from the environment of the tests."""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=False, symlinks=True)
    python = folder / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", python, "--quiet", "--disable-pip-version-check"]
    _run(*pip, "install", "--no-deps", "--no-index", wheel, cwd=folder)
    (site,) = folder.glob("lib/python*/site-packages")
    # Paths added this way do not have their own .pth files read: an editable install there stays out.
    (site / "torch.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return python


# ---------------------------------------------------------------- version


def test_version_is_the_same_everywhere() -> None:
    header = re.search(r'#define QG_VERSION "(.+)"', (ROOT / "csrc" / "q_galore.h").read_text())
    assert header is not None
    assert header[1] == VERSION
    assert q_galore_torch.__version__ == VERSION
    assert ops.core_version() == VERSION


def test_changelog_names_the_version() -> None:
    assert VERSION in (ROOT / "CHANGELOG.md").read_text()


# ---------------------------------------------------------------- sdist and wheel


def test_sdist_holds_every_source(sdist: Path) -> None:
    """setuptools packs headers, .inc and .cu files only when told to."""
    with tarfile.open(sdist) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    for folder in ("csrc", "q_galore_torch", "tests"):
        sources = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        built = re.compile(r"__pycache__/|\.(so|o|py[cod]|gcda|gcno)$|^csrc/tests/build/")
        missing = {s for s in sources if not built.search(s)} - packed
        assert not missing
    assert packed >= {"LICENSE", "README.md", "CHANGELOG.md", "Makefile", "pyproject.toml", "setup.py"}
    assert not [name for name in packed if re.search(r"\.(so|o|pyc)$|^(build|\.venv)/", name)]


@needs_compiler
def test_wheel_serves_every_python_from_3_10(wheel: Path) -> None:
    name, version, python, abi, system = wheel.stem.split("-")
    assert (name, version) == ("q_galore_torch", VERSION)
    assert (python, abi) == ("cp310", "abi3")
    assert system.startswith("linux_")


@needs_compiler
def test_wheel_holds_the_package_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "q_galore_torch").rglob("*.py")}
    assert modules <= names
    assert "q_galore_torch/py.typed" in names
    assert {n.partition("/")[0] for n in names} == {"q_galore_torch", f"q_galore_torch-{VERSION}.dist-info"}
    libraries = {"q_galore_torch/_C.abi3.so"} | ({"q_galore_torch/libq_galore_cuda13.so"} if HAS_CUDA_BUILD else set())
    assert {n for n in names if n.endswith(".so")} == libraries
    assert f"q_galore_torch-{VERSION}.dist-info/licenses/LICENSE" in names


def _metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        return Parser().parsestr(archive.read(f"q_galore_torch-{VERSION}.dist-info/METADATA").decode())


@needs_compiler
def test_wheel_metadata(wheel: Path) -> None:
    data = _metadata(wheel)
    assert data["Name"] == "q-galore-torch"
    assert data["License-Expression"] == "Apache-2.0"
    assert data["Requires-Python"] == ">=3.10"
    required = {line for line in data.get_all("Requires-Dist") or [] if "extra ==" not in line}
    assert required == {"torch>=2.10", "numpy", "safetensors>=0.4"}
    assert set(data.get_all("Provides-Extra") or []) >= {"hf", "plot", "test", "dev"}


@needs_compiler
def test_wheel_uses_only_stable_interfaces(wheel: Path, tmp_path: Path) -> None:
    audit = shutil.which("torch-abi-audit", path=str(Path(sys.executable).parent))
    if audit is None:
        pytest.skip("torch-abi-audit is not installed (it is in the test extra)")
    with zipfile.ZipFile(wheel) as archive:
        library = archive.extract("q_galore_torch/_C.abi3.so", tmp_path)
    report = _run(audit, "--check", "both", library, cwd=tmp_path)
    assert re.search(r"Torch ABI:\s+STABLE\b", report), report
    assert re.search(r"Min torch:\s+2\.10\.0\b", report), report
    assert "abi3-ok" in report
    assert "unstable=0" in report


@needs_compiler
def test_wheel_imports_in_a_clean_environment(clean_python: Path, tmp_path: Path) -> None:
    """Every module of the wheel imports and an operator runs, away from the source tree."""
    code = """
import importlib, pkgutil, sys
import q_galore_torch
assert q_galore_torch.__file__.startswith(sys.prefix), q_galore_torch.__file__
names = [m.name for m in pkgutil.walk_packages(q_galore_torch.__path__, "q_galore_torch.")]
for name in names:
    if not name.endswith(("__main__", "libq_galore_cuda13")):  # the second is no module, for all its ending
        importlib.import_module(name)
print(len(names), q_galore_torch.__version__, q_galore_torch.ops.core_version())
"""
    count, version, core = _run(clean_python, "-c", code, cwd=tmp_path, env={"PYTHONPATH": ""}).split()[-3:]
    assert int(count) >= 3
    assert version == core == VERSION


@needs_compiler
def test_info_runs_from_the_wheel(clean_python: Path, tmp_path: Path) -> None:
    printed = _run(clean_python, "-m", "q_galore_torch", "info", cwd=tmp_path, env={"PYTHONPATH": ""})
    assert f"q-galore-torch  {VERSION}" in printed


# ---------------------------------------------------------------- building


def _compiled(folder: Path) -> list[str]:
    printed = _run(sys.executable, "setup.py", "build_ext", cwd=folder, env={"Q_GALORE_CUDA": "0"})
    return re.findall(r" -c (csrc/\S+)", printed)


@needs_compiler
def test_rebuild_compiles_only_what_changed(wheel: Path, unpacked: Path) -> None:
    """The wheel was built in this folder, so nothing is left to do; then one file changes, then a header."""
    assert _compiled(unpacked) == []
    one = sorted((unpacked / "csrc" / "core").glob("*.c"))[0]
    one.touch()
    assert _compiled(unpacked) == [one.relative_to(unpacked).as_posix()]
    assert _compiled(unpacked) == []
    (unpacked / "csrc" / "core" / "check.h").touch()
    files = [p for folder in ("core", "cpu") for p in (unpacked / "csrc" / folder).glob("*.c")]
    readers = {p.relative_to(unpacked).as_posix() for p in files if '#include "core/check.h"' in p.read_text()}
    assert readers
    assert set(_compiled(unpacked)) == readers
    assert _compiled(unpacked) == []


def test_build_without_torch_says_so(unpacked: Path) -> None:
    code = (
        "import runpy, sys; sys.modules['torch'] = None; "
        "sys.argv = ['setup.py', '--quiet', 'build_ext', '--build-lib', 'elsewhere']; "
        "runpy.run_path('setup.py', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=unpacked, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1
    assert done.stderr.strip() == (
        "torch is needed to build: pip install torch, then pip install --no-build-isolation ."
    )


# ---------------------------------------------------------------- README and Makefile


def _makefile_targets() -> set[str]:
    return set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md"])
def test_make_commands_of_the_papers_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = set(re.findall(r"^make ([a-z-]+)|`make ([a-z-]+)[ `]", text, re.M))
    wanted = {a or b for a, b in named}
    assert "test" in wanted
    assert wanted <= _makefile_targets()


def test_readme_shows_demo_and_test_first() -> None:
    text = (ROOT / "README.md").read_text()
    first = re.search(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    assert first is not None
    commands = [line.split("#")[0].strip() for line in first[1].splitlines()]
    assert commands == ["make demo", "make test"]


def test_readme_links_lead_somewhere() -> None:
    links = re.findall(r"\]\((?!https?://|#)([^)#]+)", (ROOT / "README.md").read_text())
    missing = [link for link in links if not (ROOT / link).exists()]
    assert not missing


def test_readme_python_runs() -> None:
    """Each snippet of the README runs on a small model and leaves an optimizer that lowers the loss."""
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert len(blocks) >= 2
    batch = torch.randn(64, 192)
    target = torch.randn(64, 192)
    for number, block in enumerate(blocks):
        model = torch.nn.Sequential(torch.nn.Linear(192, 256), torch.nn.GELU(), torch.nn.Linear(256, 192))
        names: dict[str, Any] = {"model": model, "torch": torch}
        exec(compile(block, f"README.md, python block {number}", "exec"), names)
        losses = []
        for _ in range(10):
            loss = torch.nn.functional.mse_loss(names["model"](batch), target)
            names["opt"].zero_grad()
            loss.backward()
            names["opt"].step()
            losses.append(loss.item())
        assert losses[-1] < losses[0], f"python block {number}"


# ---------------------------------------------------------------- python -m q_galore_torch


def test_info_names_versions_backends_and_simd(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["info"]) == 0
    lines = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert lines["q-galore-torch"] == VERSION
    assert lines["C core"] == VERSION
    assert lines["torch"] == torch.__version__
    assert lines["Python"].startswith(".".join(map(str, sys.version_info[:3])))
    assert "cpu" in lines["backends"].split(", ")
    level = lines["SIMD"].split()[0]
    assert level in {"scalar", "avx2", "avx512"}
    assert level in ops.simd_levels()
    assert int(lines["threads"]) == torch.get_num_threads()
    assert re.match(r"available: .+|not available: .+", lines["CUDA"])


def test_info_says_why_cuda_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each reason is told, and the backend is listed only when there is none."""

    def missing() -> str:  # once loaded, the library stays (test_cuda_library has the real words)
        raise RuntimeError("q_galore: this installation has no CUDA kernels (it is missing)\nwhere it was thrown")

    monkeypatch.setattr(ops, "cuda_version", missing)
    monkeypatch.setattr(torch.version, "cuda", None)
    without = dict(command_line.info())
    assert without["backends"] == "cpu"
    assert without["CUDA"].startswith("not available: this installation has no CUDA kernels (")
    assert "is built without CUDA" in without["CUDA"]

    monkeypatch.setattr(ops, "cuda_version", lambda: "2.0")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    undriven = dict(command_line.info())["CUDA"]
    finds = f"torch {torch.__version__} (CUDA 13.0) finds no usable device or driver"
    assert undriven == f"not available: kernels 2.0 are installed; {finds}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"device {index}")
    for broken, expected, backends in (
        ([], "available: kernels 2.0; device 0, device 1", "cpu, cuda"),
        (["cuda:1"], "available: kernels 2.0; device 0, cuda:1 cannot be used: too old", "cpu, cuda"),
        (["cuda:0", "cuda:1"], "not available: kernels 2.0; cuda:0 cannot be used: too old, cuda:1 cannot", "cpu"),
    ):
        monkeypatch.setattr(ops, "noise", partial(_noise_unless, broken))
        assert dict(command_line.info())["CUDA"].startswith(expected)
        assert dict(command_line.info())["backends"] == backends


def _noise_unless(broken: list[str], *arguments: int, device: str) -> torch.Tensor:
    if device in broken:
        raise RuntimeError(f"q_galore: {device} cannot be used: too old\nwhere it was thrown")
    return torch.zeros(1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], f"q_galore_torch: no command given; {command_line._USAGE}\n"),
        (["train", "7b"], f"q_galore_torch: unknown command 'train 7b'; {command_line._USAGE}\n"),
        (["info", "7b"], f"q_galore_torch: unknown command 'info 7b'; {command_line._USAGE}\n"),
    ],
)
def test_unknown_command_is_one_sentence(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(words) == 2
    assert capsys.readouterr().err == message


def test_help_succeeds(capsys: pytest.CaptureFixture[str]) -> None:
    assert command_line.main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: python -m q_galore_torch")
