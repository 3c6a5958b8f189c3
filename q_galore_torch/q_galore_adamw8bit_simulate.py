"""The public package's name of the optimizer of simulated INT8 weights: the one optimizer knows a QLinear's weight."""

from q_galore_torch.optim import QGaLoreAdamW8bit as AdamW8bit

__all__ = ["AdamW8bit"]
