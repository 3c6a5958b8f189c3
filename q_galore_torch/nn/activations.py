"""What a low-rank layer keeps of its input for the backward: X, or only its projection ``X P^T``.

``R = (X P^T)^T dY`` needs no more of X than r numbers a token. But q, k and v share one X, which costs n a token
however many of them keep it, while three projections cost 3r; and where one of the readers keeps X in any case, the
projections of the others come on top. So the readers of an input are counted, and the next step acts on what the last
one showed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from q_galore_torch.subspace import FULL, LEFT

if TYPE_CHECKING:
    from q_galore_torch.nn.linear import QGaLoreLinear


class Readers:
    """What the layers that read one input would keep for their backward.

    Attributes:
        projected: bytes of all their projections together.
        whole: bytes of the input's memory.
        needed: one of them keeps the input itself, whatever the others do.
    """

    def __init__(self, whole: int) -> None:
        self.projected, self.whole, self.needed = 0, whole, False

    @property
    def project(self) -> bool:
        """Whether the projections take less memory than the input."""
        return not self.needed and self.projected < self.whole


# By the memory that is read, not by the tensor: views of it keep the same bytes alive. Forgotten with that memory.
_readers: WeakIdKeyDictionary = WeakIdKeyDictionary()


def note(x: Tensor, layer: QGaLoreLinear) -> Readers:
    """Count ``layer`` among the readers of x [..., n]; returns what all that have been counted so far would keep."""
    storage = x.untyped_storage()
    readers: Readers | None = _readers.get(storage)
    if readers is None:
        readers = _readers[storage] = Readers(storage.nbytes())
    if keeps_input(layer):
        readers.needed = True
    else:
        readers.projected += x.numel() // layer.in_features * layer.leaf.shape[0] * x.element_size()
    return readers


def keeps_input(layer: QGaLoreLinear) -> bool:
    """Whether no step of this layer can do with ``X P^T``: only the left side is projected, or G is formed anyway."""
    return not layer.save_projected or layer.grad_mode == "full" or layer.side == LEFT or cheaper_full(layer)


def cheaper_full(layer: QGaLoreLinear) -> bool:
    """Whether forming G takes fewer flops a token than forming R without it."""
    m, n, r = layer.out_features, layer.in_features, layer.leaf.shape[0]
    return r * (m + n + (r if layer.side == FULL else 0)) > m * n


def projects(x: Tensor, layer: QGaLoreLinear) -> bool:
    """Whether this forward keeps ``X P^T`` in place of x; in the step after this one it may be otherwise.

    The answer is the same in all forwards between two steps, as a checkpointed one must save the second time what it
    saved the first time.
    """
    leaf = layer.leaf
    if not (torch.is_grad_enabled() and leaf.requires_grad):
        return False
    readers = note(x, layer)
    binding = leaf.binding
    if binding is None:
        return False
    binding.readers = readers
    return binding.projects and not keeps_input(layer)
