"""Lightning's automatic optimisation: accumulation, clipping, bf16, checkpoints."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

pytest.importorskip("lightning")

import lightning

from loop_support import BATCHES, loss_of, network, optimizer_of
from test_state import differences


class Module(lightning.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = network()
        self.losses: list[float] = []

    def training_step(self, batch: Tensor) -> Tensor:
        loss = loss_of(self.net, batch)
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        return optimizer_of(self.net)


def fitted(folder: Path, resume: str | None = None, **options: Any) -> tuple[Any, Module]:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    quiet.update(accelerator="cpu", devices=1, max_epochs=1, enable_checkpointing=False, default_root_dir=folder)
    module, trainer = Module(), lightning.Trainer(**{**quiet, **options})
    trainer.fit(module, DataLoader(BATCHES, batch_size=None), ckpt_path=resume)
    return trainer, module


def everything(trainer: Any, module: Module) -> dict[str, Any]:
    return copy.deepcopy({"model": module.net.state_dict(), "optimizer": trainer.optimizers[0].state_dict()})


@pytest.mark.parametrize(("accumulation", "clip"), [(1, None), (4, None), (1, 0.05), (4, 0.05)])
def test_training_is_that_of_a_plain_loop(accumulation: int, clip: float | None, tmp_path: Path) -> None:
    trainer, module = fitted(tmp_path, accumulate_grad_batches=accumulation, gradient_clip_val=clip)
    model = network()
    opt = optimizer_of(model)
    for index, batch in enumerate(BATCHES):
        (loss_of(model, batch) / accumulation).backward()
        if (index + 1) % accumulation == 0:
            held = [p for group in opt.param_groups for p in group["params"]]  # in Lightning's order, for equal bits
            norm = torch.nn.utils.clip_grad_norm_(held, clip or 1e9)
            assert norm > 0.05
            opt.step()
            opt.zero_grad()
    assert differences(everything(trainer, module), {"model": model.state_dict(), "optimizer": opt.state_dict()}) == []
    assert trainer.global_step == 8 // accumulation


def test_bf16_trains_near_float32(tmp_path: Path) -> None:
    exact, near = (fitted(tmp_path, precision=precision)[1].losses for precision in ("32-true", "bf16-mixed"))
    assert near == pytest.approx(exact, rel=2**-6) and near != exact


def test_resume_is_bit_equal(tmp_path: Path) -> None:
    whole = fitted(tmp_path, max_epochs=2)
    trainer, _ = fitted(tmp_path)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    assert not any("coordinates" in name for name in torch.load(tmp_path / "half.ckpt")["state_dict"])
    resumed = fitted(tmp_path, str(tmp_path / "half.ckpt"), max_epochs=2)
    assert differences(everything(*whole), everything(*resumed)) == []
    assert whole[1].losses[8:] == resumed[1].losses
