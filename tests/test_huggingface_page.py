"""The code of docs/huggingface.md as it stands there, with a tiny model and data."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("lightning")

from accelerate.state import AcceleratorState
from transformers import BertForSequenceClassification, T5Config, T5ForConditionalGeneration

import q_galore_torch as qg
from trainer_support import bert, int8, sentences, texts

PAGE = (Path(__file__).parents[1] / "docs" / "huggingface.md").read_text()


def code_of(heading: str) -> list[str]:
    (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)
    return re.findall(r"^```python\n(.*?)^```", section, re.M | re.S)


def batches() -> Any:
    return DataLoader(sentences(8), batch_size=4)  # type: ignore[arg-type]


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    AcceleratorState._reset_state(reset_partial_state=True)


def test_trainer_of_the_page_trains_resumes_and_exports(tmp_path: Path) -> None:
    names: dict[str, Any] = {"model": bert(), "dataset": sentences(8)}
    exec(code_of("One line")[0], names)
    groups = names["trainer"].optimizer.param_groups
    assert [(g["rank"], g["weight_decay"]) for g in groups] == [(None, 0.1), (None, 0.0), (64, 0.1)]
    assert names["trainer"].state.global_step == 3
    names["model"] = bert()
    exec(code_of("Resume")[0], names)
    assert {entry["step"] for entry in names["trainer"].optimizer.optimizer.telemetry()} == {5}
    exec(code_of("Export")[0], names)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "trained").eval()
    tokens = sentences(2)[0]["input_ids"][None]
    assert torch.equal(loaded(tokens).logits, names["exported"].eval()(tokens).logits)


IMPORTS = "".join(line for line in code_of("One line")[0].splitlines(True) if "import" in line)


def test_seq2seq_trainer_of_the_page_trains() -> None:
    """It takes no optimizer_cls_and_kwargs, of which the page said nothing."""
    config = T5Config(vocab_size=96, d_model=64, d_kv=16, d_ff=128, num_layers=1, num_heads=4, decoder_start_token_id=0)
    names: dict[str, Any] = {"model": int8(T5ForConditionalGeneration(config)), "dataset": texts(8)}
    exec(IMPORTS + code_of("One line")[2], names)
    names["trainer"].train()
    assert {entry["step"] for entry in names["trainer"].optimizer.optimizer.telemetry()} == {3}
    assert names["trainer"].predict(texts(2), max_length=4).predictions.shape[0] == 2


def test_float_model_of_the_page_trains() -> None:
    names: dict[str, Any] = {"model": bert(), "dataset": sentences(8)}
    exec(IMPORTS + code_of("One line")[1], names)
    names["trainer"].train()
    groups = names["trainer"].optimizer.param_groups
    assert [(group["rank"], group.get("scale")) for group in groups] == [(None, None), (None, None), (128, 0.25)]


def test_galore_arguments_of_the_page_project() -> None:
    (settings,) = re.findall(r"TrainingArguments\(\.\.\., (optim=.*)\)\n", PAGE)
    (line,) = re.findall(r"^\+(trainer = .*)$", PAGE, re.M)
    names: dict[str, Any] = {"model": bert(), "dataset": sentences(8)}
    exec(f"{IMPORTS}args = TrainingArguments(output_dir='run', {settings})\n{line}", names)
    assert [group["rank"] for group in names["trainer"].create_optimizer().param_groups] == [None, None, 64]


def test_accelerate_loop_of_the_page_trains(tmp_path: Path) -> None:
    (loop,) = code_of("accelerate alone")
    names: dict[str, Any] = {"qg": qg, "model": qg.prepare_model(bert(), 8, "all-linear"), "batches": batches()}
    exec(loop, names)
    assert {entry["step"] for entry in names["opt"].optimizer.telemetry()} == {1}
    assert any((tmp_path / "state").iterdir())


def test_lightning_module_of_the_page_trains() -> None:
    (module,) = code_of("Lightning")
    names: dict[str, Any] = {"qg": qg}
    exec(module, names)
    fitted = names["Module"](bert())
    names["fit"].fit(fitted, batches())
    assert {entry["step"] for entry in fitted.optimizers().optimizer.telemetry()} == {1}
