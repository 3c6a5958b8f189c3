"""The definition of every operator of :mod:`q_galore_torch.ops` in plain PyTorch.

Slow and obvious on purpose: each function states one formula, and the compiled kernels are tested against it. Names,
arguments and results are those of ``ops``. Arithmetic is float32 in the order written, as in the kernels, so codes are
equal bit for bit; the GEMMs of :func:`galore_step_` and of the subspaces are only close.

Sources: Q-GaLore (arXiv 2407.08296), GaLore (arXiv 2403.03507), 8-bit optimizers (arXiv 2110.02861).
"""

from q_galore_torch.reference.formats import (
    absmax,
    dynamic8_dequantize,
    dynamic8_quantize,
    dynamic_map,
    int8_dequantize,
    int8_quantize,
    noise,
    projector_dequantize,
    projector_map,
    projector_quantize,
)
from q_galore_torch.reference.steps import adam8_step_, galore_step_
from q_galore_torch.reference.subspace import captured_energy, subspace_random, subspace_refresh

__all__ = [
    "absmax",
    "adam8_step_",
    "captured_energy",
    "dynamic8_dequantize",
    "dynamic8_quantize",
    "dynamic_map",
    "galore_step_",
    "int8_dequantize",
    "int8_quantize",
    "noise",
    "projector_dequantize",
    "projector_map",
    "projector_quantize",
    "subspace_random",
    "subspace_refresh",
]
