"""environment.yml and exp_requirements.txt: in line with pyproject.toml and with each other."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

tomllib = pytest.importorskip("tomllib", reason="tomllib needs Python 3.11")
yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[1]


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def requirements() -> list[str]:
    lines = (ROOT / "exp_requirements.txt").read_text().splitlines()
    return [line for line in lines if line and not line.startswith("#")]


def test_requirements_are_the_extras_of_the_examples() -> None:
    extras = project()["optional-dependencies"]
    assert sorted(requirements()) == sorted({*extras["hf"], *extras["plot"]})
    comment = (ROOT / "exp_requirements.txt").read_text()
    assert '"hf" and "plot"' in comment


def test_environment_has_what_a_build_needs() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "q-galore"
    *packages, by_pip = environment["dependencies"]
    assert f"python{project()['requires-python']}" in packages and {"pip", "make", "cxx-compiler"} <= set(packages)
    assert set(tomllib.loads((ROOT / "pyproject.toml").read_text())["build-system"]["requires"]) <= set(packages)
    torch, included = by_pip["pip"]
    assert torch in project()["dependencies"] and torch.startswith("torch")
    assert (ROOT / included.removeprefix("-r ")).is_file()


def test_comments_name_the_command_of_the_readme() -> None:
    """Without isolation, since the build needs the torch that is there."""
    command = "pip install --no-build-isolation ."
    for page in ("environment.yml", "exp_requirements.txt", "README.md"):
        assert re.sub(r"\s+#?\s*", " ", (ROOT / page).read_text()).count(command), page
