"""``python -m q_galore_torch``: what is installed and which kernels run; a report on a run; what training takes."""

from __future__ import annotations

import argparse
import platform
import sys
from typing import NoReturn

import torch

import q_galore_torch
from q_galore_torch import ops
from q_galore_torch.memory import GB, plan_memory, what_fits
from q_galore_torch.report import ReportError, write_report

_USAGE = (
    "usage: python -m q_galore_torch info | report RUN [--out FOLDER] | plan CONFIG --rank R [--gpu-memory GB] [...]"
)
_HELP = """\
info      print versions, backends, SIMD level and why CUDA is or is not available
report    draw loss and subspaces from the log of a run (its folder, or its log.jsonl): report.png and report.html,
          written beside the log or into FOLDER
plan      print the bytes that training will take, in GB of 10**9, and with --gpu-memory which ways to train fit; CONFIG
          is 60m, 130m, 350m, 1b, 7b or a Hugging Face style JSON file. More options: --batch B --tokens N (a sequence)
          --per-layer --accumulation K --clipping global|per_parameter|last_norm --activation-checkpointing
          --dtype D --grad-dtype D --weight-bits 8|none --proj-format F --proj-type T --update-proj-gap N
          --moments-dtype D"""


def _cuda() -> tuple[bool, str]:
    """Whether the CUDA backend can be used: its version and the devices, or every reason why not."""
    reasons, version = [], ""
    try:
        version = ops.cuda_version()
    except RuntimeError as error:
        reasons.append(_sentence(error))
    if torch.version.cuda is None:
        reasons.append(f"torch {torch.__version__} is built without CUDA")
    elif not torch.cuda.is_available():
        reasons.append(f"torch {torch.__version__} (CUDA {torch.version.cuda}) finds no usable device or driver")
    if reasons:
        return False, "; ".join([f"kernels {version} are installed"] * bool(version) + reasons)
    tried = [_try(index) for index in range(torch.cuda.device_count())]
    return any(good for good, _ in tried), f"kernels {version}; " + ", ".join(text for _, text in tried)


def _try(index: int) -> tuple[bool, str]:
    """Whether a kernel runs on a device; its name, or why not."""
    try:
        ops.noise(0, 0, 0, 0, 1, device=f"cuda:{index}").item()
    except RuntimeError as error:
        return False, _sentence(error)
    return True, torch.cuda.get_device_name(index)


def _sentence(error: RuntimeError) -> str:
    """The first line of what an operator raised, without its name."""
    return str(error).partition("\n")[0].removeprefix("q_galore: ")


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


def _bits(text: str) -> int | None:
    try:
        return None if text == "none" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"invalid number of bits: {text!r}") from None


def _plan(words: list[str]) -> None:
    parser = _Parser(add_help=False, allow_abbrev=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("--rank", type=int, required=True)
    parser.add_argument("--gpu-memory", type=float, default=None)
    for name in ("--batch", "--tokens", "--accumulation", "--update-proj-gap"):
        parser.add_argument(name, type=int)
    for name in ("--per-layer", "--activation-checkpointing"):
        parser.add_argument(name, action="store_true")
    parser.add_argument("--weight-bits", type=_bits)
    for name in ("--clipping", "--dtype", "--grad-dtype", "--proj-format", "--proj-type", "--moments-dtype"):
        parser.add_argument(name)
    given = vars(parser.parse_args(words))
    config, rank, memory = (given.pop(name) for name in ("config", "rank", "gpu_memory"))
    try:
        print(plan_memory(config, rank, **given))
        if memory is None:
            return
        for name in ("per_layer", "accumulation", "clipping", "grad_dtype"):  # those that what_fits goes through
            given.pop(name, None)
        fits = what_fits(config, rank, memory, **given)
    except ValueError as error:
        raise ReportError(str(error)) from None
    print(f"\n{'in ' + format(memory, 'g') + ' GB':<42}{'tracked':>9}{'total':>9}{'fits':>6}{'largest rank':>14}")
    for fit in fits:
        tracked, total = (f"{size / GB:.2f}" for size in (fit.plan.tracked, fit.plan.total))
        print(f"{fit.name:<42}{tracked:>9}{total:>9}{'yes' if fit.fits else 'no':>6}{fit.largest_rank or 'none':>14}")


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
        The exit code: 0, or 2 for a command line that is not understood, a run that cannot be reported on or a
        model that cannot be planned for.
    """
    words = sys.argv[1:] if arguments is None else arguments
    if words in (["-h"], ["--help"]):
        print(f"{_USAGE}\n\n{_HELP}")
        return 0
    try:
        if words[:1] == ["report"]:
            _report(words[1:])
        elif words[:1] == ["plan"]:
            _plan(words[1:])
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
