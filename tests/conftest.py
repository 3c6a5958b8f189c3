"""What every test runs under: two threads, one seed, reproducible hypothesis examples, and skips that are counted.

With ``--device cuda`` (make gpu-check) the tensors of the tests are made on the GPU, and the ops are still held to the
definitions of ``q_galore_torch.reference`` as the CPU computes them.
"""

from __future__ import annotations

import collections
import functools
import gc
import os
import weakref
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, settings

import emulated
from elsewhere import CPU_ONLY, Elsewhere, on_cpu
from q_galore_torch.nn import leaf

# Sums of a GEMM depend on the thread count: the same everywhere, so that a failure is one everywhere.
THREADS = min(2, os.cpu_count() or 1)

settings.register_profile(
    "project", derandomize=True, deadline=None, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("project")

EMULATED = emulated.Emulated() if emulated.wanted() else None
if EMULATED is not None:
    EMULATED.use()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu (default) or cuda")


def pytest_configure(config: pytest.Config) -> None:
    device = torch.device(config.getoption("--device"))
    if config.getoption("--device") == "cpu":  # cpu:0 goes the way of a GPU, to try it out
        return
    if device.type == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(f"--device {device}: torch {torch.__version__} finds no usable GPU")
    from q_galore_torch import ops, reference

    # Collection makes tensors, too: the mode stays on until the process ends.
    mode = Elsewhere(device)
    mode.__enter__()
    for name in reference.__all__:
        setattr(reference, name, on_cpu(getattr(reference, name), mode))
    for name in ("noise", "subspace_random"):  # they take no tensor to go by
        setattr(ops, name, functools.partial(getattr(ops, name), device=device))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--device") != "cpu":
        for item in items:
            reason = CPU_ONLY.get(item.name.partition("[")[0])
            if reason is not None:
                item.add_marker(pytest.mark.skip(reason=f"for the CPU alone: {reason}"))


def pytest_report_header() -> list[str]:
    """Which extension is tested, and with which kernels."""
    from q_galore_torch import _C, ops

    level = f"SIMD {ops.simd_level()} of {', '.join(ops.simd_levels())}"
    if EMULATED is not None:
        level = "CUDA kernels under emulation"
    return [f"q_galore_torch: {_C.__file__}", f"{level}; torch {torch.__version__}, {THREADS} threads"]


@pytest.fixture(autouse=True)
def _same_start_for_every_test():
    """Each test starts from the same threads and seed, and leaves neither its dtype nor its modes to the next."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)
    torch.use_deterministic_algorithms(False)
    assert torch.is_grad_enabled(), "the test left gradients switched off"


@pytest.fixture
def own_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    """A buffer of zeros for this test's leaves alone: that of other tests' models may be longer."""
    monkeypatch.setattr(leaf, "_buffers", weakref.WeakValueDictionary())


@pytest.fixture
def process_group() -> Iterator[None]:
    """A gloo group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    gc.collect()  # a reducer that is freed after its group holds the GIL and waits for a thread that wants it (2.13)
    dist.destroy_process_group()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Count what was skipped, by reason: a skip that nobody sees is a test that nobody runs."""
    reasons: collections.Counter[str] = collections.Counter()
    for report in terminalreporter.stats.get("skipped", []):
        text = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        reasons[text.removeprefix("Skipped: ")] += 1
    terminalreporter.section("skipped tests")
    terminalreporter.line(f"{sum(reasons.values())} tests skipped")
    for reason, count in reasons.most_common():
        terminalreporter.line(f"  {count} x {reason}")
