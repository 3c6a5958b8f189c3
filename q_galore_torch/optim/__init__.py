"""The optimizer."""

from q_galore_torch.optim.finite import NonFiniteGradientError
from q_galore_torch.optim.galore import GaLoreAdamW, GaLoreAdamW8bit
from q_galore_torch.optim.galore_adamw import QGaLoreAdamW8bit

__all__ = ["GaLoreAdamW", "GaLoreAdamW8bit", "NonFiniteGradientError", "QGaLoreAdamW8bit"]
