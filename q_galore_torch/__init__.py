"""Q-GaLore for PyTorch: INT8 weights, quantised low-rank projections, 8-bit Adam and a low-rank backward."""

from q_galore_torch.checkpoint import load_model, save_model
from q_galore_torch.memory import MemoryPlan, plan_memory
from q_galore_torch.nn import QGaLoreLinear, export_model, num_parameters, param_groups, prepare_model
from q_galore_torch.optim import GaLoreAdamW, GaLoreAdamW8bit, NonFiniteGradientError, QGaLoreAdamW8bit
from q_galore_torch.optim.clip import clip_grad_norm_
from q_galore_torch.optim.per_layer import enable_per_layer
from q_galore_torch.q_galore_adamw8bit_simulate import AdamW8bit as QGaLoreAdamW8bit_simulate

__version__ = "2.0.0.dev0"

__all__ = [
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "MemoryPlan",
    "NonFiniteGradientError",
    "QGaLoreAdamW8bit",
    "QGaLoreAdamW8bit_simulate",
    "QGaLoreLinear",
    "clip_grad_norm_",
    "enable_per_layer",
    "export_model",
    "load_model",
    "num_parameters",
    "param_groups",
    "plan_memory",
    "prepare_model",
    "save_model",
]
