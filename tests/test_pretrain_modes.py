"""run_pretrain's training modes: per-layer updates, accumulation, clipping, activation checkpointing, meta models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
import q_galore_torch as qg  # noqa: E402
import run_pretrain  # noqa: E402
from pretrain import checkpoint  # noqa: E402
from pretrain.flags import parse_flags  # noqa: E402
from pretrain.model import MLP, build_model, initializer  # noqa: E402
from pretrain.optimizers import TARGET_MODULES  # noqa: E402
from pretrain.processes import ALONE  # noqa: E402
from pretrain.report import state_bytes, weight_bytes  # noqa: E402
from pretrain.stopping import StopRequest  # noqa: E402
from pretrain_support import (  # noqa: E402
    EXAMPLES,
    Q_GALORE,
    TINY,
    environment,
    losses,
    one_thread,  # noqa: F401 - a fixture
    records,
    run,
    tiny_flags,
    write_config,
    write_corpus,
)

PER_LAYER = {**Q_GALORE, "optimizer": "q_galore_adamw8bit_per_layer"}
GALORE = {"optimizer": "galore_adamw8bit", "rank": 16, "update_proj_gap": 3}

# The second command line of the README this project continues, as it is typed in the folder of the script.
PUBLISHED_7B = """run_pretrain.py --model_config configs/llama_7b.json --lr 0.004 --galore_scale 0.25 --rank 1024
    --update_proj_gap 500 --batch_size 16 --total_batch_size 512 --activation_checkpointing --num_training_steps 150000
    --warmup_steps 15000 --weight_decay 0 --grad_clipping 1.0 --dtype bfloat16 --eval_every 1000 --single_gpu
    --proj_quant --weight_quant --stochastic_round --optimizer q_galore_adamw8bit_per_layer""".split()


def trainer(folder: Path, **changes: Any) -> run_pretrain.Trainer:
    """A run that has not begun."""
    return run_pretrain.Trainer(parse_flags(tiny_flags(folder, **changes)), StopRequest(), ALONE)


def numbers(rows: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return [(row["step"], row["loss"], row["lr"]) for row in rows if row["kind"] == "train"]


def test_published_7b_command_line_runs_as_typed(tmp_path: Path) -> None:
    """In a folder like that of the examples, whose configs/llama_7b.json is small; flags behind it make it short."""
    (tmp_path / "configs").mkdir()
    Path(write_config(tmp_path)).rename(tmp_path / "configs" / "llama_7b.json")
    (tmp_path / "run_pretrain.py").symlink_to(EXAMPLES / "run_pretrain.py")
    added = (
        f"--num_training_steps 2 --max_length 16 --eval_tokens 64 --data text {write_corpus(tmp_path)} --save_dir run"
    )
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1"]
    command = [sys.executable, *launcher, *PUBLISHED_7B, *added.split()]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = records(tmp_path / "run")
    assert sorted(losses(rows)) == [1, 2] and [row["tokens"] for row in rows if row["kind"] == "train"] == [8192, 16384]
    assert "llama_7b: 116,032 weights, q_galore_adamw8bit_per_layer, bfloat16 on cpu\n" in done.stdout


@pytest.mark.parametrize(
    ("ordinary", "changes"),
    [
        (Q_GALORE, {}),
        (Q_GALORE, {"gradient_accumulation": 3, "dtype": "bfloat16"}),
        (Q_GALORE, {"grad_clipping": 0.5}),
        ({**Q_GALORE, "weight_quant": None, "stochastic_round": None}, {"activation_checkpointing": True}),
        (GALORE, {}),
        (GALORE, {"gradient_accumulation": 3, "activation_checkpointing": True}),
    ],
    ids=["q", "q-accumulated-bf16", "q-clipped", "q-float-checkpointed", "galore", "galore-accumulated-checkpointed"],
)
def test_per_layer_run_gives_the_ordinary_losses(
    tmp_path: Path, ordinary: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Bit for bit; clipped ones to rounding, since the norm is summed in another order."""
    first = run(tmp_path, **ordinary, **changes)
    name = f"{ordinary['optimizer']}_per_layer"
    second = run(tmp_path, **{**ordinary, **changes, "optimizer": name}, save_dir=tmp_path / "second")
    if "grad_clipping" in changes:
        assert losses(second) == pytest.approx(losses(first), rel=1e-4)
    else:
        assert numbers(second) == numbers(first) and losses(second, "eval") == losses(first, "eval")
    norms = [[row["grad_norm"] for row in rows if row["kind"] == "train"] for rows in (first, second)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-3) and min(norms[0]) > 0.5


@pytest.mark.parametrize("at_once", [None, 70], ids=["whole", "in-parts"])
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize(
    "optimizer", ["adam8bit", "galore_adamw8bit_per_layer", *(o["optimizer"] for o in (Q_GALORE, PER_LAYER))]
)
def test_an_update_is_one_step_of_everything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, accumulation: int, at_once: int | None
) -> None:
    """Of the scheduler, of the optimizer, and of every parameter's Adam, embedding and norms included."""
    counts = {"optimizer": 0, "scheduler": 0}
    step = LambdaLR.step

    def counted(self: LambdaLR) -> None:
        counts["scheduler"] += 1
        step(self)

    if at_once is not None:
        monkeypatch.setattr(run_pretrain, "CPU_TOKENS_AT_ONCE", at_once)
    quantised = {key: value for key, value in Q_GALORE.items() if optimizer.startswith("q_") or "quant" not in key}
    changes = {**quantised, "optimizer": optimizer, "gradient_accumulation": accumulation, "stochastic_round": None}
    work = trainer(tmp_path, **changes)
    monkeypatch.setattr(LambdaLR, "step", counted)
    work.optimizer.register_step_post_hook(lambda *_: counts.update(optimizer=counts["optimizer"] + 1))
    for _ in range(4):
        work.update()
    assert work.backwards == accumulation * (1 if at_once is None else 2)
    assert counts == {"optimizer": 4, "scheduler": 4}
    assert {entry["step"] for entry in work.optimizer.telemetry()} == {4}
    assert len(work.optimizer.telemetry()) == 2 * 9 + 3


def test_clipping_by_the_norm_before_is_announced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = {**GALORE, "optimizer": "galore_adamw8bit_per_layer", "num_training_steps": 2, "grad_clipping": 0.01}
    run(tmp_path, **flags)
    assert capsys.readouterr().out.count("clips by the norm of the update before (clip='last_norm')") == 1
    run(tmp_path, **PER_LAYER, num_training_steps=2, grad_clipping=0.01, save_dir=tmp_path / "second")
    assert "clips by" not in capsys.readouterr().out


@pytest.mark.parametrize("model", ["ours", "transformers"])
def test_activation_checkpointing_runs_layers_again_and_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    layer: Any = MLP
    if model == "transformers":
        pytest.importorskip("transformers", reason="trains transformers' model, which is not installed")
        from transformers.models.llama.modeling_llama import LlamaMLP as layer  # noqa: N813
    calls, forward = [], layer.forward

    def counted(self: Any, *args: Any, **keywords: Any) -> Any:
        calls.append(torch.is_grad_enabled())
        return forward(self, *args, **keywords)

    monkeypatch.setattr(layer, "forward", counted)
    changes = {**PER_LAYER, "num_training_steps": 5, "use_hf_model": True if model == "transformers" else None}
    plain = run(tmp_path, **changes)
    once = sum(calls)
    again = run(tmp_path, **changes, activation_checkpointing=True, save_dir=tmp_path / "second")
    assert once == 5 * 2 and sum(calls) - once == 2 * once
    assert numbers(again) == numbers(plain)


@pytest.mark.parametrize("use_hf_model", [False, True], ids=["ours", "transformers"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_run_begins_with_the_weights_of_a_float_model(tmp_path: Path, dtype: str, use_hf_model: bool) -> None:
    """Quantised layer by layer off the meta device, they are the codes of the whole model made in float."""
    if use_hf_model:
        pytest.importorskip("transformers", reason="builds transformers' model, which is not installed")
    work = trainer(tmp_path, **Q_GALORE, dtype=dtype, use_hf_model=use_hf_model or None)
    torch.manual_seed(0)
    whole = build_model(str(tmp_path / "tiny.json"), use_hf_model, getattr(torch, dtype))
    deviation = whole.model.embed_tokens.weight.float().std().item()
    assert deviation == pytest.approx(0.02, rel=0.02)
    qg.prepare_model(whole, rank=16, target_modules=TARGET_MODULES)
    for kind in ("named_parameters", "named_buffers"):
        ours, theirs = dict(getattr(work.model, kind)()), dict(getattr(whole, kind)())
        assert ours.keys() == theirs.keys() and len(ours) > 0
        for name, tensor in ours.items():
            with torch.no_grad():
                assert tensor.dtype == theirs[name].dtype and torch.equal(tensor, theirs[name]), name


def test_transformers_model_off_the_meta_device_is_whole(tmp_path: Path) -> None:
    """Rotary frequencies, which no state dict holds, are in float32 as the constructor makes them; ties are kept."""
    transformers = pytest.importorskip("transformers", reason="builds transformers' model, which is not installed")
    path = write_config(tmp_path, tie_word_embeddings=True, attention_bias=True)
    model = build_model(path, use_hf_model=True, dtype=torch.bfloat16)
    theirs = transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**TINY, "max_position_embeddings": 128}))
    assert torch.equal(model.model.rotary_emb.inv_freq, theirs.model.rotary_emb.inv_freq)
    assert model.model.rotary_emb.inv_freq.dtype == torch.float32
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.model.layers[0].self_attn.q_proj.bias.count_nonzero() == 0
    shell = build_model(path, use_hf_model=True, dtype=torch.bfloat16, on_meta=True)
    torch.manual_seed(0)
    qg.prepare_model(shell, rank=16, target_modules=TARGET_MODULES, initialize=initializer(0.02, torch.bfloat16))
    assert shell.lm_head.weight is shell.model.embed_tokens.weight and not shell.lm_head.weight.is_meta
    assert torch.equal(shell.model.rotary_emb.inv_freq, model.model.rotary_emb.inv_freq)


@pytest.mark.parametrize("changes", [PER_LAYER, {"optimizer": "adamw"}], ids=["q_galore_per_layer", "adamw"])
def test_a_checkpoint_is_read_in_parts_and_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """With next to nothing read at once the files are mapped many times; nothing of them is mapped afterwards."""
    whole = run(tmp_path, **changes, save_every=6)
    reads, read = [], checkpoint._read
    monkeypatch.setattr(checkpoint, "READ_AT_ONCE", 100_000)
    monkeypatch.setattr(checkpoint, "_read", lambda path: reads.append(path.name) or read(path))
    part = trainer(tmp_path, **changes, continue_from=tmp_path / "run" / "model_6", save_dir=tmp_path / "second")
    assert reads.count("model.pt") >= 2 and reads.count("training_state.pt") >= 3
    maps = Path("/proc/self/maps")
    assert not maps.exists() or "model_6" not in maps.read_text()
    got = [part.update()[0] for _ in range(6)]
    assert got == [losses(whole)[step] for step in range(7, 13)]


def test_a_gradient_that_is_no_number_ends_a_per_layer_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = tiny_flags(
        tmp_path, **{**PER_LAYER, "weight_quant": None, "stochastic_round": None}, lr=1e30, warmup_steps=0
    )
    assert run_pretrain.main(flags) == 1
    error = capsys.readouterr().err
    assert "a smaller --lr may help" in error and "Traceback" not in error
    assert not list((tmp_path / "run").glob("model_*"))


def test_state_counts_no_optimizer_of_torch(tmp_path: Path) -> None:
    """A plain optimizer takes as many steps as there are updates, too."""
    work = trainer(tmp_path, gradient_accumulation=3)
    for _ in range(2):
        work.update()
    assert isinstance(work.optimizer, Optimizer)
    assert {int(state["step"]) for state in work.optimizer.state.values()} == {2}


def test_60m_takes_the_bytes_that_the_planner_says(tmp_path: Path) -> None:
    """The path of benchmarks/pretrain_7b.py with a smaller model; no gradient outlives its hook."""
    flags = """--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant --rank 128
        --activation_checkpointing --batch_size 1 --max_length 32 --gradient_accumulation 1 --dtype bfloat16""".split()
    config = str(EXAMPLES / "configs" / "llama_60m.json")
    data = ["--data", "text", write_corpus(tmp_path), "--save_dir", str(tmp_path / "run"), "--device", "cpu"]
    work = run_pretrain.Trainer(parse_flags(["--model_config", config, *flags, *data]), StopRequest(), ALONE)
    first = work.update()[0]
    assert 10 < first < 12 and abs(work.update()[0] - first) < 1
    plan = qg.plan_memory(config, 128, tokens=32, per_layer=True, activation_checkpointing=True, update_proj_gap=50)
    weights, state = plan.weights + plan.scales + plan.zero_leaf, plan.projectors + plan.moments + plan.schedule
    assert weight_bytes(work.model) == pytest.approx(weights, rel=0.005)
    assert state_bytes(work.optimizer) == pytest.approx(state + plan.old_bases, rel=0.005)
    assert work.gradient_bytes == 0


HOLES = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from pretrain.report import give_back_freed_memory

def resident():
    return int(next(line for line in open("/proc/self/status") if line.startswith("RssAnon")).split()[1]) / 1024

if sys.argv[2] == "call":
    give_back_freed_memory()
del (large := [torch.ones(16 * 2**18)])[:]  # after which glibc no longer maps what is smaller
blocks = [torch.ones(2 * 2**18) for _ in range(64)]
before = resident()
del blocks[::2]
print(before - resident())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc and needs glibc's malloc")
def test_freed_memory_goes_back() -> None:
    """Half of 128 MiB in blocks of 2 MiB, every other one; without the call all of it stays."""
    freed = {}
    for word in ("call", "no"):
        command = [sys.executable, "-c", HOLES, str(EXAMPLES), word]
        freed[word] = float(
            subprocess.run(command, env=environment(), capture_output=True, text=True, check=True).stdout
        )
    assert freed["call"] > 60 and freed["no"] < 10
