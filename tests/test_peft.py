"""PEFT beside this package: its adapters are left alone, and its modules train with our optimizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
pytest.importorskip("peft")

import peft
from transformers import Trainer

import q_galore_torch as qg
from q_galore_torch.integrations.transformers import trainer_kwargs
from trainer_support import RANK, arguments, int8, llama, logged, texts, trained


def adapted(model: Any, **options: Any) -> Any:
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], **options))


def kinds(model: nn.Module, part: str) -> set[str]:
    return {type(module).__name__ for name, module in model.named_modules() if name.endswith(part)}


@pytest.mark.parametrize("targets", ["all-linear", ["attn", "mlp"], r".*(proj|base_layer|lora_[AB]\.default|lm_head)"])
def test_adapters_and_their_weights_are_not_converted(targets: Any) -> None:
    model = adapted(llama(), modules_to_save=["lm_head"])
    before = {id(module) for module in model.modules() if type(module).__module__.startswith("peft")}
    qg.prepare_model(model, rank=RANK, target_modules=targets)
    assert kinds(model, "lora_A.default") | kinds(model, "lora_B.default") | kinds(model, "base_layer") == {"Linear"}
    assert kinds(model, "modules_to_save.default") == {"Linear"}
    assert kinds(model, "o_proj") | kinds(model, "up_proj") == {"QGaLoreLinear"}
    assert before == {id(module) for module in model.modules() if type(module).__module__.startswith("peft")}


def test_merge_of_adapters_counts_beside_int8_layers() -> None:
    """PEFT merges by writing to .weight, which of an INT8 layer would be a copy."""
    model = qg.prepare_model(adapted(llama()), rank=RANK, target_modules="all-linear").eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    tokens = texts(1)[0]["input_ids"][None]
    with torch.no_grad():
        apart = model(tokens).logits
        merged = model.merge_and_unload()(tokens).logits
    assert not torch.equal(apart, merged)
    torch.testing.assert_close(merged, apart, rtol=1e-4, atol=1e-5)


def test_adapters_over_int8_layers_train(tmp_path: Path) -> None:
    """Adapters beside a frozen INT8 base, with the Trainer's own groups."""
    model = adapted(int8(llama(), target_modules=["mlp"]))
    codes = model.base_model.model.model.layers[0].mlp.up_proj.qweight.clone()
    args = arguments(tmp_path, max_steps=40, learning_rate=3e-2, lr_scheduler_type="constant")
    one_line = (qg.QGaLoreAdamW8bit, {"lr": args.learning_rate})
    trainer = Trainer(model=model, args=args, train_dataset=texts(4), optimizer_cls_and_kwargs=one_line)
    trainer.train()
    losses = logged(trainer, "loss")
    assert losses[-1] < losses[0] - 0.3
    assert torch.equal(codes, model.base_model.model.model.layers[0].mlp.up_proj.qweight)
    assert all("lora" in name for name, p in model.named_parameters() if p.requires_grad)


def test_adapters_and_int8_layers_train_together(tmp_path: Path) -> None:
    model = int8(adapted(llama()), target_modules=["mlp"])
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("lora" in name or "mlp" in name)
    trainer = trained(model, arguments(tmp_path, max_steps=3), texts())
    ranks = {group["rank"]: len(group["params"]) for group in trainer.optimizer.param_groups}
    assert ranks == {None: 8, RANK: 6}


def test_frozen_int8_base_is_told_of() -> None:
    model = adapted(int8(llama(), target_modules=["mlp"]))
    with pytest.raises(ValueError, match="all prepared layers of the model are frozen: give the optimizer the param"):
        trainer_kwargs(model, lr=1e-3)


def test_peft_refuses_to_adapt_an_int8_layer() -> None:
    """In a sentence of its own: nothing is adapted by half."""
    with pytest.raises(ValueError, match="QGaLoreLinear.* is not supported"):
        adapted(int8(llama()))
