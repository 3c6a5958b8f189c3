"""What the optimizer lends to a low-rank layer for its backward."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from q_galore_torch import ops
from q_galore_torch.subspace import FULL

if TYPE_CHECKING:
    from q_galore_torch.nn.activations import Readers
    from q_galore_torch.nn.leaf import ZeroLeaf


class Binding:
    """A layer's projector, and the stash of its full gradient in the steps in which a new basis is due.

    The projector's tensors belong to the optimizer's state and are refreshed in place.

    Attributes:
        due: the next step ends with a new basis, so that the backward also sums the full gradient.
        stash: float32 [m, n], the sum over the micro-batches of the window, or None.
        projects: until the next step a forward keeps X P^T in place of X.
        readers: of the layer's last input.
    """

    def __init__(self, state: dict[str, Any], group: dict[str, Any]) -> None:
        self.codes, self.scales, self.zeros = state["proj_codes"], state["proj_scales"], state["proj_zeros"]
        self.dim, self.side = state["dim"], state["side"]
        self._right: tuple[Tensor, Tensor, Tensor, int] | None = None
        if self.side == FULL:
            codes, scales, zeros = state["right_codes"], state["right_scales"], state["right_zeros"]
            self._right = (codes, scales, zeros, state["right_dim"])
        self.proj_format, self.proj_block = group["proj_format"], group["proj_block"]
        self.due, self.projects = False, False
        self.readers: Readers | None = None
        self.stash: Tensor | None = None
        self._pending: dict[int, Tensor] = {}  # G of a running backward, by autograd's number of it
        self._accumulated, self._incomplete = False, False
        self._hook: RemovableHandle | None = None

    def mark(self, due: bool) -> None:
        """Fix for the next step whether G is summed, and whether ``X P^T`` is kept in place of X."""
        self.due = due
        self.projects = not due and self.readers is not None and self.readers.project

    @property
    def edition(self) -> tuple[Tensor, int]:
        """Changes whenever the basis does."""
        return self.codes, self.codes._version

    def basis(self, dtype: torch.dtype) -> Tensor:
        """The decoded basis [r, d]; on both sides the left one [r, m]."""
        return self._decoded(self.codes, self.scales, self.zeros, self.dim, dtype)

    def right_basis(self, dtype: torch.dtype) -> Tensor:
        """The decoded right basis [r, n] of a weight that is projected on both sides."""
        assert self._right is not None
        return self._decoded(*self._right, dtype)

    def _decoded(self, codes: Tensor, scales: Tensor, zeros: Tensor, dim: int, dtype: torch.dtype) -> Tensor:
        direct = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        return ops.projector_dequantize(codes, scales, zeros, self.proj_format, self.proj_block, dim, direct).to(dtype)

    def add(self, gradient: Tensor, leaf: ZeroLeaf) -> None:
        """Take a backward's full gradient [m, n]; it joins the stash when R joins the leaf's ``.grad``.

        Never, where that does not happen: under ``torch.autograd.grad``, or if the backward raises in between. If the
        leaf's gradient was accumulated and has gone since (``model.zero_grad()``), so has the stash's meaning.
        """
        self._watch(leaf)
        task = torch._C._current_graph_task_id()
        if task in self._pending:  # the layer was called twice
            self._pending[task] = self._pending[task].float().add_(gradient)
            return
        self._pending[task] = gradient
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(lambda: self._pending.pop(task, None))

    def settle(self) -> None:
        """In a hook that runs after R was accumulated: the stash takes what the same backward has added."""
        gradient = self._pending.pop(torch._C._current_graph_task_id(), None)
        if gradient is None or self._incomplete:
            return
        if self.stash is None:
            self.stash = gradient.float()
        else:
            self.stash.add_(gradient)

    def miss(self, leaf: ZeroLeaf) -> None:
        """A micro-batch has no G: the sum of the others would pass for the window's, so the layer stays due."""
        self._watch(leaf)
        self.stash, self._incomplete = None, True

    def _watch(self, leaf: ZeroLeaf) -> None:
        self.forget_if_zeroed(leaf)
        if self._hook is None:
            self._hook = leaf.register_post_accumulate_grad_hook(self._mark)

    def lends(self, state: dict[str, Any]) -> bool:
        """Whether it is this state's projector that the layer has: an optimizer made later takes the layer over."""
        return self.codes is state["proj_codes"]

    def forget_if_zeroed(self, leaf: ZeroLeaf) -> None:
        """Forget the stash if the leaf's accumulated gradient was removed or zeroed since."""
        if self._accumulated and (leaf.grad is None or not leaf.grad.any()):
            self.stash, self._accumulated, self._incomplete = None, False, False

    def _mark(self, leaf: Tensor) -> None:
        self.settle()
        # An R that is zero by itself, as G is orthogonal to the basis, must not look like one that was zeroed.
        self._accumulated = leaf.grad is not None and bool(leaf.grad.any())

    def drop(self) -> None:
        """Forget the stash; ``due`` stays."""
        self.stash, self._accumulated, self._incomplete = None, False, False
        self._pending.clear()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None
