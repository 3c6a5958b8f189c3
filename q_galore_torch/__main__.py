"""``python -m q_galore_torch``: what is installed and which kernels will run; a report on a run."""

from __future__ import annotations

import argparse
import platform
import sys
from pathlib import Path
from typing import NoReturn

import torch

import q_galore_torch
from q_galore_torch import ops
from q_galore_torch.report import ReportError, write_report

_CUDA_LIBRARY = "libq_galore_cuda13.so"
_USAGE = "usage: python -m q_galore_torch info | report RUN [--out FOLDER]"
_HELP = """\
info      print versions, backends, SIMD level and why CUDA is or is not available
report    draw loss and subspaces from the log of a run (its folder, or its log.jsonl): report.png and report.html,
          written beside the log or into FOLDER"""


def _cuda() -> tuple[bool, str]:
    """Whether the CUDA backend can be used, and the devices or every reason why not."""
    reasons = []
    if not (Path(q_galore_torch.__file__).parent / _CUDA_LIBRARY).exists():
        reasons.append(f"this installation has no CUDA kernels ({_CUDA_LIBRARY} is missing)")
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device or driver")
    if reasons:
        return False, "; ".join(reasons)
    names = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return True, ", ".join(names)


def info() -> list[tuple[str, str]]:
    """The lines that ``info`` prints.

    Returns:
        Pairs of a name and its value: versions, backends, SIMD level in use and those available, threads, CUDA.

    Example:
        >>> from q_galore_torch.__main__ import info
        >>> dict(info())["backends"].split(", ")[0]
        'cpu'
    """
    cuda, why = _cuda()
    return [
        ("q-galore-torch", q_galore_torch.__version__),
        ("C core", ops.core_version()),
        ("torch", torch.__version__),
        ("Python", f"{platform.python_version()} ({platform.machine()})"),
        ("backends", "cpu, cuda" if cuda else "cpu"),
        ("SIMD", f"{ops.simd_level()} (available: {', '.join(ops.simd_levels())})"),
        ("threads", str(torch.get_num_threads())),
        ("CUDA", f"available: {why}" if cuda else f"not available: {why}"),
    ]


class _Parser(argparse.ArgumentParser):
    """An argument parser that complains in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise ReportError(f"{message}; {_USAGE}")


def _report(words: list[str]) -> None:
    parser = _Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--out", metavar="FOLDER")
    given = parser.parse_args(words)
    for path in write_report(given.run, given.out):
        print(path)


def _info() -> None:
    lines = info()
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def main(arguments: list[str] | None = None) -> int:
    """Run one command.

    Args:
        arguments: The command line without the program's name; default ``sys.argv[1:]``.

    Returns:
        The exit code: 0, or 2 for a command line that is not understood or a run that cannot be reported on.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["-h"], ["--help"]):
        print(f"{_USAGE}\n\n{_HELP}")
        return 0
    try:
        if words[:1] == ["report"]:
            _report(words[1:])
        elif words == ["info"]:
            _info()
        else:
            given = f"unknown command {' '.join(words)!r}" if words else "no command given"
            raise ReportError(f"{given}; {_USAGE}")
    except ReportError as error:
        print(f"q_galore_torch: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
