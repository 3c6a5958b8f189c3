"""Loading from torch.distributed.checkpoint (DCP)."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata


def _varies(name: str, names: dict[str, Any]) -> bool:
    """Whether an entry is the queue of similarities or the basis before the newest one, which are empty at times."""
    owner, _, key = name.rpartition(".")
    return (key == "queue" or key.startswith("past_")) and f"{owner}.last_due" in names


class LoadPlanner(DefaultLoadPlanner):
    """Lets ``torch.distributed.checkpoint.load`` fill the optimizer's state from a checkpoint of any step.

    DCP fills the tensors of the state that it is given and refuses one of another shape. Of this package's state some
    are empty at one step and not at another; those are given the checkpoint's shape first. All else is as in torch's
    ``DefaultLoadPlanner``, whose arguments it takes.

    Example:
        >>> import torch.distributed.checkpoint as dcp
        >>> dcp.load(state, checkpoint_id=folder, planner=LoadPlanner())  # doctest: +SKIP
    """

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Called by DCP before anything is read."""
        super().set_up_planner(state_dict, metadata, is_coordinator)
        saved = {} if metadata is None else metadata.state_dict_metadata
        for name, value in self.state_dict.items():
            entry = saved.get(name)
            if isinstance(entry, TensorStorageMetadata) and isinstance(value, Tensor) and _varies(name, saved):
                value.resize_(entry.size)
