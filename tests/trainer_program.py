"""What torchrun starts in each process for tests/test_trainer_processes.py: the script that one process would run."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer

import q_galore_torch as qg
from trainer_support import arguments, int8, llama, logged, state_of, texts, trained


def result_of(trainer: Trainer) -> dict[str, Any]:
    return {
        "state": state_of(trainer),
        "losses": logged(trainer, "loss"),
        "norms": logged(trainer, "grad_norm"),
        "wrapper": type(trainer.model_wrapped).__name__,
    }


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    sizes = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    args = arguments(folder / "run", save_strategy="steps", save_steps=3, **sizes)
    results: dict[str, Any] = {}
    for name, checkpoint in (("whole", None), ("resumed", str(folder / "run" / "checkpoint-3"))):
        model = int8(llama())
        if dist.get_rank() == 1:  # codes that must come from the first process
            model.model.layers[0].mlp.up_proj.qweight.fill_(3)
        results[name] = result_of(trained(model, args, texts(), checkpoint, update_proj_gap=2))
    full = trained(int8(llama(), grad_mode="full"), arguments(folder, bf16=True), texts(), update_proj_gap=2)
    plain = trained(llama(), arguments(folder), texts(), update_proj_gap=2, rank=8, target_modules="all-linear")
    results.update(full=result_of(full), float=result_of(plain))
    model = int8(llama(), weight_bits=None)
    optimizer = qg.QGaLoreAdamW8bit(qg.param_groups(model), lr=1e-3)
    try:
        Trainer(model=model, args=arguments(folder), train_dataset=texts(), optimizers=(optimizer, None)).train()
    except RuntimeError as error:
        results["by hand"] = str(error)
    torch.save(results, folder / f"{dist.get_rank()}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
