"""The optimizer."""

from q_galore_torch.optim.finite import NonFiniteGradientError
from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit

__all__ = ["NonFiniteGradientError", "QGaLoreAdamW8bit"]
