"""Simulated INT8 training under the public package's names: float weights on an INT8 grid."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from q_galore_torch.nn.convert import convert_named
from q_galore_torch.nn.old_names import hook_parameters
from q_galore_torch.nn.simulate import QLinear

__all__ = ["QLinear", "prepare_model_for_int8_training_simulation"]


def prepare_model_for_int8_training_simulation(model: nn.Module, args: Any, target_module: Sequence[str]) -> nn.Module:
    """Replace linear layers by :class:`QLinear`, in place; the parameters stay the same objects.

    Args:
        model: any module. Only children whose type is exactly ``nn.Linear`` are converted.
        args: has ``weight_bits`` (only 8), ``weight_group_size`` and ``stochastic_round``.
        target_module: the children's own names, such as ``["q_proj", "down_proj"]``.

    Returns:
        ``model``.

    Raises:
        ValueError: an option is out of range, nothing matches, or a matching layer cannot be converted: its parent
            reads ``.weight`` itself, or the weight is shared with another module, computed from other tensors or not
            finite. No layer is converted then.

    Note:
        ``setattr(p, "backward_hook", f)`` works for every parameter of the model afterwards, as after
        :func:`q_galore_torch.utils.quantization.prepare_model_for_int8_training`.

    Example:
        >>> from argparse import Namespace
        >>> args = Namespace(weight_bits=8, weight_group_size=256, stochastic_round=True)
        >>> model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 8))
        >>> type(prepare_model_for_int8_training_simulation(model, args, ["0"])[0]).__name__
        'QLinear'
    """
    options = (args.weight_bits, args.weight_group_size, args.stochastic_round)
    convert_named(model, target_module, lambda name, linear: QLinear.from_linear(linear, *options, name))
    hook_parameters(model)
    return model
