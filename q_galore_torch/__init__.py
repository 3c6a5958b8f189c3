"""Q-GaLore for PyTorch: INT8 weights, quantised low-rank projections, 8-bit Adam and a low-rank backward."""

from q_galore_torch.memory import MemoryPlan, plan_memory
from q_galore_torch.nn import QGaLoreLinear, export_model, num_parameters, param_groups, prepare_model
from q_galore_torch.optim import GaLoreAdamW, GaLoreAdamW8bit, NonFiniteGradientError, QGaLoreAdamW8bit
from q_galore_torch.optim.clip import clip_grad_norm_
from q_galore_torch.optim.per_layer import enable_per_layer

__version__ = "2.0.0.dev0"

__all__ = [
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "MemoryPlan",
    "NonFiniteGradientError",
    "QGaLoreAdamW8bit",
    "QGaLoreLinear",
    "clip_grad_norm_",
    "enable_per_layer",
    "export_model",
    "num_parameters",
    "param_groups",
    "plan_memory",
    "prepare_model",
]
