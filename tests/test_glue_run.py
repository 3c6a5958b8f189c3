"""examples/run_glue.py from its first line to its last: a tiny random BERT on sentences that a few words give away."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.data import load_texts  # noqa: E402
from glue.flags import parse_flags  # noqa: E402
from glue.train import FineTuning, TrainingFailed, position_counts  # noqa: E402
from glue_support import write_glue, write_model, write_sentences  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402
from pretrain_support import one_thread  # noqa: E402, F401 - a fixture
from run_glue import main, run  # noqa: E402

transformers = pytest.importorskip("transformers")
pytest.importorskip("sklearn")

GALORE = "--enable_galore --lora_all_modules --lora_r 8 --galore_scale 2 --update_proj_gap 4".split()
QUICK = "--learning_rate 5e-3 --max_train_steps 12 --per_device_train_batch_size 8 --device cpu".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def sentences(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_sentences(tmp_path_factory.mktemp("sentences"))


def tuning(*flags: str) -> FineTuning:
    args = parse_flags(list(flags))
    return FineTuning(args, load_texts(args), args.all_seeds[0])


@pytest.mark.parametrize("method", [[], GALORE, [*GALORE, "--proj_format", "int4", "--weight_quant"]])
def test_run_learns(model: str, sentences: list[str], method: list[str]) -> None:
    flags = ["--model_name_or_path", model, *sentences, *QUICK, "--max_train_steps", "40", "--num_warmup_steps", "5"]
    (record,) = run(parse_flags([*flags, *method]))
    assert record["metrics"]["accuracy"] > 0.9
    assert record["updates"] == 40 and record["train_loss"] < 0.4


@pytest.mark.usefixtures("own_zeros")
def test_run_of_galore_keeps_fewer_bytes_than_adamw(model: str, sentences: list[str]) -> None:
    kinds = [[], GALORE, [*GALORE, "--proj_format", "int4"], [*GALORE, "--proj_format", "int4", "--weight_quant"]]
    flags = ["--model_name_or_path", model, *sentences, *QUICK, "--max_train_steps", "1"]
    each = [tuning(*flags, *kind) for kind in kinds]
    records = [training.train() for training in each]
    state, projector, weights = (
        [record[f"{name}_bytes"] for record in records] for name in ("optimizer_state", "projector", "weight")
    )
    # torch's AdamW: two moments and a step of 4 bytes each.
    assert state[0] == sum(2 * 4 * p.numel() + 4 for p in each[0].model.parameters())
    # 12 matrices of which the shorter side has 32, at rank 8: two values a byte, and for each basis vector, which is
    # shorter than a block of 256, a scale of 2 bytes and a zero point of 1.
    assert projector == [0, 12 * 8 * 32 * 4, 12 * 8 * (32 // 2 + 3), 12 * 8 * (32 // 2 + 3)]
    assert state[0] > state[1] > state[2] >= state[3] and state[1] - state[2] == projector[1] - projector[2]
    # In each of two layers 4 matrices of 32 x 32 and 2 of 32 x 64: a byte, not four, and 6 bytes a group of 256.
    matrices = 2 * (4 * 32 * 32 + 2 * 32 * 64)
    assert weights[0] == weights[1] == weights[2]
    assert weights[0] - weights[3] == pytest.approx(3 * matrices - 6 * matrices / 256, rel=0.05)


def test_run_is_the_same_for_the_same_seed(model: str, sentences: list[str]) -> None:
    method = [*GALORE, "--proj_format", "int4", "--weight_quant"]
    runs = [tuning("--model_name_or_path", model, *sentences, *QUICK, *method, "--seed", s) for s in ("3", "3", "4")]
    losses = [run.train()["train_loss"] for run in runs]
    assert losses[0] == losses[1] != losses[2]


def test_run_by_parts_of_an_update_is_the_same_update(model: str, sentences: list[str]) -> None:
    whole, parts = (
        tuning("--model_name_or_path", model, *sentences, *QUICK, "--learning_rate", "1e-3", *split)
        for split in ([], ["--per_device_train_batch_size", "3", "--gradient_accumulation_steps", "2"])
    )
    for each in (whole, parts):
        each.model.eval()  # no dropout, whose draws depend on the parts
    rows = [0, 1, 2, 3, 4]  # parts of 3 and 2 rows, each row with the same weight
    assert whole._update(rows) == pytest.approx(parts._update(rows), rel=1e-5)
    for one, other in zip(whole.model.parameters(), parts.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-5)


def test_run_counts_updates_of_epochs(model: str, sentences: list[str]) -> None:
    flags = ["--model_name_or_path", model, *sentences, "--num_train_epochs", "2", "--gradient_accumulation_steps", "3"]
    training = tuning(*flags, "--per_device_train_batch_size", "5")
    assert training.updates == 2 * 4  # 48 rows, 15 an update
    rows = list(training._rows_of_updates())
    assert [len(part) for part in rows] == [15, 15, 15, 3] * 2
    for epoch in (rows[:4], rows[4:]):
        assert sorted(i for part in epoch for i in part) == list(range(48))


def test_run_rate_falls_to_zero_in_a_line(model: str, sentences: list[str]) -> None:
    training = tuning("--model_name_or_path", model, *sentences, *QUICK, "--max_train_steps", "4")
    rates = []
    for numbers in ([0, 1], [2, 3], [4, 5], [6, 7]):
        rates.append(training.optimizer.param_groups[0]["lr"])
        training._update(numbers)
    assert rates == pytest.approx([5e-3, 3.75e-3, 2.5e-3, 1.25e-3])


def test_predict_sees_every_row_once_in_its_order(model: str, sentences: list[str]) -> None:
    flags = ["--model_name_or_path", model, *sentences, "--per_device_eval_batch_size", "4"]  # 21 rows: a rest of one
    training = tuning(*flags)
    split = training.texts.validation[""]
    found, labels = training.predict(split)
    expected = []
    for text in split.texts[0]:
        with torch.no_grad():
            expected.append(training.model(**training.tokenizer(text, return_tensors="pt")).logits.argmax().item())
    assert found == expected
    assert labels == list(split.labels)


def test_predict_gives_padding_no_weight(model: str, sentences: list[str]) -> None:
    logits = []
    for extra in ([], ["--pad_to_max_length", "--max_length", "30"]):
        training = tuning("--model_name_or_path", model, *sentences, *extra)
        batch = training._batch(training.train_rows, [0, 1, 2])
        training.model.eval()
        logits.append(training.model(**batch).logits)
        assert batch["input_ids"].shape[1] == (
            30 if extra else max(len(training.train_rows.rows[i]["input_ids"]) for i in range(3))
        )
    torch.testing.assert_close(*logits, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("task", ["stsb", "mnli", "cola"])
def test_run_of_each_kind_of_task_has_its_metrics(model: str, tmp_path: Path, task: str) -> None:
    folder = write_glue(tmp_path, task)
    flags = ["--model_name_or_path", model, "--task_name", task, "--data_dir", str(folder), "--max_train_steps", "1"]
    (record,) = run(parse_flags([*flags, "--ignore_mismatched_sizes"]))
    expected = {
        "stsb": ["pearson", "spearmanr"], "mnli": ["accuracy", "accuracy_mm"], "cola": ["matthews_correlation"]
    }  # fmt: skip
    assert list(record["metrics"]) == expected[task]


def test_run_of_a_regression_fits_numbers(model: str, tmp_path: Path) -> None:
    rows = [
        {"text": word, "label": value} for word, value in (("happy", 1.5), ("sad", -1.5), ("cold", -1.0), ("warm", 1.0))
    ]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    flags = ["--model_name_or_path", model, *QUICK, "--max_train_steps", "30", "--ignore_mismatched_sizes"]
    files = ["--train_file", str(tmp_path / "a.json"), "--validation_file", str(tmp_path / "a.json")]
    (record,) = run(parse_flags([*flags, *files]))
    assert record["metrics"]["pearson"] > 0.9


def test_model_that_knows_the_classes_keeps_their_order(sentences: list[str], tmp_path: Path) -> None:
    name = write_model(tmp_path, id2label={0: "GOOD", 1: "BAD"}, label2id={"GOOD": 0, "BAD": 1})
    training = tuning("--model_name_or_path", name, *sentences)
    assert training.texts.labels == ("bad", "good")
    assert training.model.config.label2id == {"bad": 1, "good": 0}
    wanted = [1 - int(label) for label in training.texts.train.labels]
    assert training.train_rows.labels.tolist() == wanted


def test_classes_that_differ_in_case_stay_apart(tmp_path: Path) -> None:
    name = write_model(tmp_path, id2label={0: "Yes", 1: "yes"}, label2id={"Yes": 0, "yes": 1})
    (tmp_path / "a.csv").write_text("text,label\nhappy,Yes\nsad,yes\n")
    files = ["--train_file", str(tmp_path / "a.csv"), "--validation_file", str(tmp_path / "a.csv")]
    training = tuning("--model_name_or_path", name, *files)
    assert training.train_rows.labels.tolist() == [0, 1]
    assert training.model.config.label2id == {"Yes": 0, "yes": 1}


def test_model_of_another_kind_of_task_can_be_taken_further(sentences: list[str], tmp_path: Path) -> None:
    rows = [{"text": word, "label": value} for word, value in (("happy", 1.5), ("sad", -1.5))]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    numbers = ["--train_file", str(tmp_path / "a.json"), "--validation_file", str(tmp_path / "a.json")]
    name = write_model(tmp_path / "model")
    for number, files in enumerate((numbers, sentences, numbers)):
        flags = ["--model_name_or_path", name, *files, *QUICK, "--max_train_steps", "1", "--ignore_mismatched_sizes"]
        name = str(tmp_path / str(number))
        run(parse_flags([*flags, "--output_dir", name]))
        kind = json.loads((tmp_path / str(number) / "config.json").read_text())["problem_type"]
        assert kind == ("single_label_classification" if files is sentences else "regression")


@pytest.mark.parametrize("pad", [[], ["--pad_to_max_length"]])
def test_rows_are_no_longer_than_the_model_has_positions(model: str, tmp_path: Path, pad: list[str]) -> None:
    rows = [{"text": "happy " * 50, "label": 0}, {"text": "sad", "label": 1}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    files = ["--train_file", str(tmp_path / "a.json"), "--validation_file", str(tmp_path / "a.json")]
    training = tuning("--model_name_or_path", model, *files, *QUICK, "--max_length", "128", *pad)
    training._update([0, 1])
    assert training._batch(training.train_rows, [0])["input_ids"].shape == (1, 32)
    assert training._batch(training.train_rows, [1])["input_ids"].shape == (1, 32 if pad else 3)


def test_positions_of_roberta_are_counted_behind_its_padding() -> None:
    config = transformers.RobertaConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8,
        max_position_embeddings=34, pad_token_id=1,
    )  # fmt: skip
    model = transformers.RobertaForSequenceClassification(config)
    (count,) = position_counts(model)
    assert count == 32
    model(input_ids=torch.full((1, count), 5))


def test_output_folder_has_results(model: str, sentences: list[str], tmp_path: Path) -> None:
    flags = ["--model_name_or_path", model, *sentences, *QUICK, "--max_train_steps", "2"]
    (record,) = run(parse_flags([*flags, "--output_dir", str(tmp_path)]))
    assert json.loads((tmp_path / "all_results.json").read_text()) == {"eval_accuracy": record["metrics"]["accuracy"]}
    assert json.loads((tmp_path / "results.json").read_text())[0]["method"] == record["method"]
    assert f"| {record['method']} |" in (tmp_path / "results.md").read_text()
    assert (tmp_path / "model.safetensors").is_file()


def test_saved_model_with_int8_weights_loads_as_floats(model: str, sentences: list[str], tmp_path: Path) -> None:
    method = [*GALORE, "--proj_format", "int4", "--weight_quant"]
    training = tuning("--model_name_or_path", model, *sentences, *QUICK, *method)
    for start in range(3):  # away from the weights that it began with
        training._update([start, start + 1])
    training.save(str(tmp_path))
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = tokenizer(training.texts.validation[""].texts[0], return_tensors="pt", padding=True)
    training.model.eval()
    with torch.no_grad():
        torch.testing.assert_close(loaded(**batch).logits, training.model(**batch).logits, rtol=1e-5, atol=1e-6)


def test_output_folder_keeps_finished_runs(
    model: str, sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", model, *sentences, *QUICK, "--output_dir", str(tmp_path)]
    run(parse_flags([*flags, "--seeds", "1", "2"]))
    assert (tmp_path / "seed_2" / "config.json").is_file() and not (tmp_path / "config.json").exists()
    run(parse_flags([*flags, "--seeds", "1", "2", "3", "--no_save_model"]))
    assert "seed 1 is in" in capsys.readouterr().out and not (tmp_path / "seed_3").exists()
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    run(parse_flags([*flags, "--seed", "1", "--learning_rate", "1e-3", "--no_save_model"]))  # another setting
    assert len(json.loads((tmp_path / "results.json").read_text())) == 2
    run(parse_flags([*flags, "--seed", "1", "--no_save_model", "--overwrite_output_dir"]))
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 1


def test_run_of_a_loss_that_is_no_number_fails(
    model: str, sentences: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: Any, numbers: list[int]) -> float:
        raise TrainingFailed("the loss is nan; a smaller --learning_rate may help")

    training = tuning("--model_name_or_path", model, *sentences)
    with torch.no_grad():
        next(training.model.parameters()).fill_(float("nan"))
    with pytest.raises(TrainingFailed, match="the loss is nan; a smaller --learning_rate may help"):
        training._update([0, 1])
    monkeypatch.setattr(FineTuning, "_update", broken)
    assert main(["--model_name_or_path", model, *sentences]) == 1
    assert "run_glue.py: the loss is nan" in capsys.readouterr().err


def test_run_whose_last_update_breaks_the_model_fails(
    model: str, sentences: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model_name_or_path", model, *sentences, "--device", "cpu", "--max_train_steps", "1"]
    assert main([*flags, "--learning_rate", "1e30"]) == 1
    assert "a model without finite outputs" in capsys.readouterr().err


def test_model_that_is_not_there_is_refused(
    sentences: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    assert main(["--model_name_or_path", str(tmp_path / "empty"), *sentences]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "cannot load --model_name_or_path" in error


def test_head_of_another_size_is_refused(model: str, tmp_path: Path) -> None:
    folder = write_glue(tmp_path, "mnli")
    with pytest.raises(UsageError, match="does not have 3 outputs, which the data needs: --ignore_mis"):
        tuning("--model_name_or_path", model, "--task_name", "mnli", "--data_dir", str(folder))
