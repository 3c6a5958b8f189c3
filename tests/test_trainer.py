"""Hugging Face's Trainer with trainer_kwargs: what it logs, clips, accumulates, saves and resumes is right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from safetensors.torch import load_file
from transformers import AlbertConfig, AlbertForSequenceClassification, LlamaForCausalLM, Trainer, TrainerCallback

import q_galore_torch as qg
from q_galore_torch.integrations.transformers import trainer_kwargs
from trainer_support import (
    NO_DROPOUT,
    RANK,
    arguments,
    bert,
    differing,
    int8,
    llama,
    logged,
    roberta,
    sentences,
    state_of,
    texts,
    trained,
)

# How a model is made and what trainer_kwargs is told with it: INT8 low-rank, INT8 with full gradients, plain floats.
MODES: dict[str, tuple[Any, dict[str, Any]]] = {
    "low_rank": (int8, {}),
    "full": (lambda model: int8(model, grad_mode="full"), {}),
    "float": (lambda model: model, {"rank": RANK, "target_modules": "all-linear"}),
}
EVERY_MODE = pytest.mark.parametrize("mode", list(MODES))
INT8_MODES = pytest.mark.parametrize("mode", ["low_rank", "full"])


def run(mode: str, args: Any, network: Any = llama, data: Any = None, resume: str | None = None) -> Trainer:
    make, options = MODES[mode]
    data = texts() if data is None else data
    return trained(make(network()), args, data, resume, update_proj_gap=2, **options)


def logits_of(model: Any) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(texts(4)[0]["input_ids"][None]).logits


# ---------------------------------------------------------------- training


def test_trainer_learns(tmp_path: Path) -> None:
    """Eight sequences nearly by heart; without a step the loss stays at log(96) = 4.56."""
    args = arguments(tmp_path, max_steps=30, learning_rate=1e-2, lr_scheduler_type="constant")
    losses = logged(trained(int8(llama()), args, texts(8), scale=1.0, update_proj_gap=10), "loss")
    assert losses[-1] < 2.5 < 4.4 < losses[0]


@EVERY_MODE
def test_group_keys_and_state_dtypes_survive_accelerate(mode: str, tmp_path: Path) -> None:
    """accelerate's prepare() calls load_state_dict(state_dict()), where torch's own casts every tensor."""
    make, options = MODES[mode]
    model, args = make(llama()), arguments(tmp_path, max_steps=1)
    keywords = trainer_kwargs(model, args, update_proj_gap=7, scale=0.5, proj_format="int4", **options)
    kind, given = keywords["optimizer_cls_and_kwargs"]
    fresh = kind(**given)
    dtypes = [{k: getattr(v, "dtype", None) for k, v in fresh.state[p].items()} for p in fresh.state]
    trainer = Trainer(model=model, args=args, train_dataset=texts(), **keywords)
    trainer.train()
    (group,) = [group for group in trainer.optimizer.param_groups if group["rank"] is not None]
    assert {key: group[key] for key in ("rank", "update_proj_gap", "scale", "proj_format")} == {
        **{"rank": RANK, "update_proj_gap": 7, "scale": 0.5, "proj_format": "int4"}
    }
    state = trainer.optimizer.state_dict()["state"]
    assert [{k: getattr(v, "dtype", None) for k, v in entry.items()} for entry in state.values()] == dtypes
    assert any(torch.uint8 in entry.values() for entry in dtypes)


def gradient_norm(model: Any, batch: list[dict[str, Tensor]]) -> float:
    """Of one batch, R of low-rank layers included, in float64."""
    model.train()
    model(**{key: torch.stack([row[key] for row in batch]) for key in batch[0]}).loss.backward()
    squares = [p.grad.double().square().sum().item() for p in model.parameters() if p.grad is not None]
    return sum(squares) ** 0.5


@EVERY_MODE
def test_logged_norm_is_that_of_the_gradients(mode: str, tmp_path: Path) -> None:
    make, _ = MODES[mode]
    norm = logged(
        run(mode, arguments(tmp_path, max_steps=1, per_device_train_batch_size=8), data=texts(8)), "grad_norm"
    )
    model = make(llama())
    opt = qg.QGaLoreAdamW8bit(qg.param_groups(model)) if mode == "low_rank" else None  # which lends the bases
    assert norm == pytest.approx([gradient_norm(model, texts(8))], rel=1e-5)
    del opt


class Norms(TrainerCallback):
    """The norms that the optimizer sees."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        gradients = [p.grad for p in given["model"].parameters() if p.grad is not None]
        self.seen.append(sum(g.double().square().sum().item() for g in gradients) ** 0.5)


@EVERY_MODE
def test_max_grad_norm_clips(mode: str, tmp_path: Path) -> None:
    make, options = MODES[mode]
    model, args, norms = make(llama()), arguments(tmp_path, max_grad_norm=0.25, max_steps=3), Norms()
    more = trainer_kwargs(model, args, **options)
    trainer = Trainer(model=model, args=args, train_dataset=texts(), callbacks=[norms], **more)
    trainer.train()
    assert min(logged(trainer, "grad_norm")) > 1 and norms.seen == pytest.approx([0.25] * 3, rel=1e-4)


@INT8_MODES
def test_accumulation_is_one_large_batch(mode: str, tmp_path: Path) -> None:
    """To the rounding of sums in float32, across changes of basis; and so four micro-batches of two are 1e-5 close."""
    one = run(mode, arguments(tmp_path, per_device_train_batch_size=8, max_steps=4))
    four = run(mode, arguments(tmp_path, per_device_train_batch_size=2, gradient_accumulation_steps=4, max_steps=4))
    for key in ("loss", "grad_norm"):
        assert logged(four, key) == pytest.approx(logged(one, key), rel=1e-5)


@pytest.mark.parametrize("network", [bert, roberta])
def test_accumulation_with_a_loss_that_ignores_its_keywords(network: Any, tmp_path: Path) -> None:
    """These classifiers take num_items_in_batch and do not divide by it; the Trainer is told so by hand."""
    results = []
    for size, count in ((8, 1), (2, 4)):
        model = int8(network())
        model.accepts_loss_kwargs = False
        args = arguments(tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=count, max_steps=3)
        results.append(trained(model, args, sentences()))
    for key in ("loss", "grad_norm"):
        assert logged(results[1], key) == pytest.approx(logged(results[0], key), rel=1e-5)


@INT8_MODES
def test_bf16_trains_near_float32(mode: str, tmp_path: Path) -> None:
    """Autocast computes in bfloat16 (8 bits); gradients come back in the parameters' float32."""
    exact, near = (run(mode, arguments(tmp_path, bf16=bf16, max_steps=4)) for bf16 in (False, True))
    assert logged(near, "loss") == pytest.approx(logged(exact, "loss"), rel=2**-8)
    assert logged(near, "grad_norm") == pytest.approx(logged(exact, "grad_norm"), rel=2**-6)
    assert logged(near, "loss") != logged(exact, "loss")
    assert all(p.dtype == torch.float32 for p in near.model.parameters())
    assert all(torch.isfinite(v).all() for v in state_of(near).values() if v.is_floating_point())


@INT8_MODES
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_no_bit(mode: str, reentrant: bool, tmp_path: Path) -> None:
    how = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    plain, checkpointed = (run(mode, arguments(tmp_path, max_steps=4, **more)) for more in ({}, how))
    assert differing(state_of(plain), state_of(checkpointed)) == []
    assert logged(plain, "loss") == logged(checkpointed, "loss")


def test_optimizer_may_be_made_by_hand(tmp_path: Path) -> None:
    """The two ways that the Trainer has for it agree."""
    args, results = arguments(tmp_path, max_steps=3), []
    for made in (False, True):
        model = int8(llama())
        groups = qg.param_groups(model, update_proj_gap=2)
        more: dict[str, Any] = {"optimizer_cls_and_kwargs": (qg.QGaLoreAdamW8bit, {"params": groups, "lr": 1e-3})}
        if made:
            more = {"optimizers": (qg.QGaLoreAdamW8bit(groups, lr=1e-3), None)}
        trainer = Trainer(model=model, args=args, train_dataset=texts(), **more)
        trainer.train()
        results.append(state_of(trainer))
    assert differing(*results) == []


def test_rate_is_scheduled_for_all_groups(tmp_path: Path) -> None:
    args = arguments(tmp_path, max_steps=4, warmup_steps=2, lr_scheduler_type="linear")
    trainer = run("low_rank", args)
    assert logged(trainer, "learning_rate") == pytest.approx([0.0, 5e-4, 1e-3, 5e-4])
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {0.0}


# ---------------------------------------------------------------- saving and resuming


@EVERY_MODE
def test_resume_is_bit_equal(mode: str, tmp_path: Path) -> None:
    """Weights, the optimizer's state and the losses, with a dropout's random numbers and changes of basis."""

    def network() -> Any:
        return bert(hidden_dropout_prob=0.1)

    args = arguments(tmp_path, save_strategy="steps", save_steps=3, max_steps=7, weight_decay=0.1)
    whole = run(mode, args, network, sentences())
    resumed = run(mode, args, network, sentences(), str(tmp_path / "checkpoint-3"))
    assert differing(state_of(whole), state_of(resumed)) == []
    assert logged(whole, "loss") == logged(resumed, "loss")
    assert logged(whole, "grad_norm")[3:] == logged(resumed, "grad_norm")[3:]


@EVERY_MODE
def test_checkpoint_holds_plain_tensors(mode: str, tmp_path: Path) -> None:
    run(mode, arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=2))
    saved = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    assert saved["param_groups"][-1]["rank"] == RANK and saved["state"]
    assert not any("coordinates" in name for name in load_file(tmp_path / "checkpoint-2" / "model.safetensors"))


@INT8_MODES
def test_saved_int8_model_is_loaded_into_a_prepared_one(mode: str, tmp_path: Path) -> None:
    trainer = run(mode, arguments(tmp_path, max_steps=2))
    trainer.save_model(str(tmp_path / "saved"))
    saved = load_file(tmp_path / "saved" / "model.safetensors")
    assert saved["model.layers.0.mlp.up_proj.qweight"].dtype == torch.uint8
    model = MODES[mode][0](llama())
    model.load_state_dict(saved)
    assert torch.equal(logits_of(model), logits_of(trainer.model))


def test_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """With a rate so high that later steps are worse."""
    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, learning_rate=0.3)
    args.eval_strategy, args.eval_steps, args.load_best_model_at_end = args.save_strategy, 2, True
    args.metric_for_best_model, args.greater_is_better = "loss", False
    model = int8(llama())
    more = trainer_kwargs(model, args)
    trainer = Trainer(model=model, args=args, train_dataset=texts(), eval_dataset=texts(), **more)
    trainer.train()
    losses = logged(trainer, "eval_loss")
    assert min(losses) < max(losses) and trainer.evaluate()["eval_loss"] == pytest.approx(min(losses), rel=1e-6)


@EVERY_MODE
@pytest.mark.parametrize("bf16", [False, True])
def test_exported_model_is_one_of_transformers(mode: str, bf16: bool, tmp_path: Path) -> None:
    """accelerate puts a forward under autocast into a model that trains with bf16; it is taken out here."""
    trainer = run(mode, arguments(tmp_path, bf16=bf16, max_steps=2))
    exported = qg.export_model(trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    exported.save_pretrained(tmp_path / "exported")
    loaded, told = LlamaForCausalLM.from_pretrained(tmp_path / "exported", output_loading_info=True)
    assert not any(told[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.equal(logits_of(loaded), logits_of(exported))
    assert torch.equal(logits_of(loaded), logits_of(trainer.model))


# ---------------------------------------------------------------- shared modules


@EVERY_MODE
def test_tied_embeddings_stay_tied(mode: str, tmp_path: Path) -> None:
    def network() -> Any:
        return llama(tie_word_embeddings=True)

    args = arguments(tmp_path, save_strategy="steps", save_steps=2, max_steps=4)
    whole = run(mode, args, network)
    assert differing(state_of(whole), state_of(run(mode, args, network, resume=str(tmp_path / "checkpoint-2")))) == []
    exported = qg.export_model(whole.model)
    assert exported.lm_head.weight is exported.model.embed_tokens.weight
    exported.save_pretrained(tmp_path / "exported")
    assert torch.equal(logits_of(LlamaForCausalLM.from_pretrained(tmp_path / "exported")), logits_of(whole.model))


def shared() -> Any:
    """A module that is registered twice, as LayoutLM's successors have them."""
    model = bert()
    model.bert.encoder.layer[1] = model.bert.encoder.layer[0]
    return model


def test_shared_modules_get_the_sum_of_their_gradients() -> None:
    """The reference is an ordinary model with the decoded weights."""
    model = int8(shared(), grad_mode="full")
    plain = qg.export_model(model)
    for network in (model, plain):
        gradient_norm(network, sentences(4))
    layer, reference = (network.bert.encoder.layer[1].intermediate.dense for network in (model, plain))
    torch.testing.assert_close(layer.weight.grad, reference.weight.grad, rtol=1e-5, atol=1e-8)


@EVERY_MODE
def test_shared_modules_train_as_one(mode: str, tmp_path: Path) -> None:
    trainer = run(mode, arguments(tmp_path, max_steps=3), shared, sentences())
    layers = trainer.model.bert.encoder.layer
    assert layers[0] is layers[1]
    held = [id(p) for group in trainer.optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held)) == len(list(trainer.model.parameters()))
    exported = qg.export_model(trainer.model).bert.encoder.layer
    assert exported[0] is exported[1]


def test_layer_that_is_called_many_times_trains(tmp_path: Path) -> None:
    """ALBERT calls one layer for all of its depth."""

    def network() -> Any:
        torch.manual_seed(0)
        sizes = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=3, num_attention_heads=4)
        config = AlbertConfig(vocab_size=96, embedding_size=32, max_position_embeddings=32, **sizes, **NO_DROPOUT)
        return AlbertForSequenceClassification(config)

    args = arguments(tmp_path, max_steps=4, save_strategy="steps", save_steps=2)
    whole = run("low_rank", args, network, sentences())
    resumed = run("low_rank", args, network, sentences(), str(tmp_path / "checkpoint-2"))
    assert differing(state_of(whole), state_of(resumed)) == []


# ---------------------------------------------------------------- per-layer updates


def test_per_layer_updates_of_the_trainers_optimizer_are_refused(tmp_path: Path) -> None:
    trainer = run("low_rank", arguments(tmp_path, max_steps=1))
    with pytest.raises(TypeError, match="per-layer updates are for plain loops, got a AcceleratedOptimizer"):
        qg.enable_per_layer(trainer.optimizer)
