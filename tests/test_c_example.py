"""The C library without Python: the example compiles with gcc alone and trains; its page shows that same program."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "abi.md").read_text()
BLOCKS = re.findall(r"^```c\n(.*?)^```", PAGE, re.M | re.S)

needs_gcc = pytest.mark.skipif(
    shutil.which("gcc") is None or shutil.which("make") is None, reason="gcc or make is not installed"
)


@needs_gcc
def test_example_trains(tmp_path: Path) -> None:
    """Its exit status says so, and so do the figures that it prints."""
    command = ["make", "-s", "-C", str(ROOT / "examples" / "c"), "run", f"BUILD={tmp_path}"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stderr == ""
    first, last = map(float, re.findall(r"^loss ([\d.]+) -> ([\d.]+)$", done.stdout, re.M)[0])
    assert 0.0 < last < first / 100
    energies = [float(e) for e in re.findall(r"-> ([\d.]+)$", done.stdout, re.M)[:-1]]
    assert len(energies) == 4
    assert min(energies) > 16 / 48, "a basis captures no more than any 16 of 48 directions"


def test_page_shows_the_example() -> None:
    assert (ROOT / "examples/c/least_squares.c").read_text() in BLOCKS


@needs_gcc
def test_gpu_part_of_the_page_compiles(tmp_path: Path) -> None:
    (fragment,) = [block for block in BLOCKS if "qg_cuda_open" in block]
    source = tmp_path / "gpu.c"
    source.write_text(
        f'#include <stdio.h>\n#include "q_galore.h"\n{fragment}\nint (*used)() = (int (*)())step_on_gpu;\n'
    )
    command = ["gcc", "-std=c11", "-Wall", "-Wextra", "-Werror", "-fsyntax-only", f"-I{ROOT / 'csrc'}", str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_links_between_pages_lead_somewhere() -> None:
    missing = []
    for page in sorted((ROOT / "docs").rglob("*.md")):
        for link in re.findall(r"\]\((?!https?://|#)([^)#\s]+)", page.read_text()):
            if not (page.parent / link).exists():
                missing.append(f"{page.relative_to(ROOT)}: {link}")
    assert not missing
