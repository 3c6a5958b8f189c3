"""The layer, and the conversion of models."""

from q_galore_torch.nn.convert import export_model, num_parameters, param_groups, prepare_model
from q_galore_torch.nn.linear import QGaLoreLinear

__all__ = ["QGaLoreLinear", "export_model", "num_parameters", "param_groups", "prepare_model"]
