"""The public Q-GaLore 1.0 as a contestant on the CPU, from an unpacked wheel; nothing of it is part of this project.

It was written for bitsandbytes < 0.44 and for CUDA. Three things are bridged here so that its step runs at all: it
passes ``optimizer_update_8bit_blockwise`` its arguments by positions that have moved since, it reads options that are
gone, and it synchronises CUDA.

    pip download --no-deps q-galore-torch==1.0 && unzip -d public q_galore_torch-1.0-*.whl
    pip install --no-deps bitsandbytes
    python benchmarks/bench_step.py --public public
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

ALIAS = "public_q_galore"


def load_public(folder: Path) -> ModuleType:
    """The public optimizer module under another name, so that both packages live in one process."""
    package = folder / "q_galore_torch"
    if not (package / "q_galore_adamw8bit.py").exists():
        sys.exit(f"{folder} holds no q_galore_torch/q_galore_adamw8bit.py: unpack the public 1.0 wheel there")
    outer = ModuleType(ALIAS)
    outer.__path__ = [str(package)]  # type: ignore[attr-defined]
    sys.modules[ALIAS] = outer
    name = f"{ALIAS}.q_galore_adamw8bit"
    spec = importlib.util.spec_from_file_location(name, package / "q_galore_adamw8bit.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    _bridge(module)
    return module


def _bridge(module: ModuleType) -> None:
    update = module.F.optimizer_update_8bit_blockwise
    parameters = list(inspect.signature(update).parameters)

    class Functional:
        """bitsandbytes.functional with the one function's old positions."""

        def __getattr__(self, name: str):
            return getattr(_functional, name)

        @staticmethod
        def optimizer_update_8bit_blockwise(
            optimizer,
            grad,
            p,
            state1,
            state2,
            beta1,
            beta2,
            eps,
            step,
            lr,
            qmap1,
            qmap2,
            absmax1,
            absmax2,
            decay=0.0,
            **_,
        ):
            given = dict(
                optimizer_name=optimizer, g=grad, p=p, state1=state1, state2=state2, beta1=beta1, beta2=beta2,
                beta3=0.0, alpha=0.0, eps=eps, step=step, lr=lr, qmap1=qmap1, qmap2=qmap2, absmax1=absmax1,
                absmax2=absmax2, weight_decay=decay, gnorm_scale=1.0, skip_zeros=False,
            )  # fmt: skip
            update(**{name: value for name, value in given.items() if name in parameters})

    _functional = module.F
    module.F = Functional()
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda device=None: None  # type: ignore[assignment]


def public_step(module: ModuleType, weight: Tensor, rank: int, gap: int = 10**9):
    """A function that takes a full gradient and makes one public step on an INT8 copy of ``weight``."""

    class AdamW8bit(module.AdamW8bit):  # type: ignore[name-defined,misc]
        def get_config(self, *where):
            return {**super().get_config(*where), "percentile_clipping": 100, "block_wise": True, "max_unorm": 0.0}

    parameter = torch.nn.Parameter(weight.clone())
    group = dict(
        params=[parameter], rank=rank, update_proj_gap=gap, scale=0.25, proj_type="std", quant=True, quant_n_bit=4,
        quant_group_size=256, cos_threshold=0.4, gamma_proj=2, queue_size=5,
    )  # fmt: skip
    optimizer = AdamW8bit([group], lr=1e-3, weight_decay=0.0)
    parameter.requires_grad_(False)
    codes, scales, zeros = optimizer._quantize(weight, q_group_size=256)
    parameter.data = codes
    parameter.scales, parameter.zeros, parameter.group_size = scales, zeros, 256
    parameter.stochastic_round = True

    def step(gradient: Tensor) -> None:
        parameter.float_grad = gradient
        optimizer.step()

    return step
