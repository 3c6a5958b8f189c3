"""The optimizer."""

from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit
from q_galore_torch.optim.update import NonFiniteGradientError

__all__ = ["NonFiniteGradientError", "QGaLoreAdamW8bit"]
