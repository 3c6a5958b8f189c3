"""examples/run_glue.py: texts and labels out of GLUE's files, of files of one's own, and of the hub."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent / "examples")]
from glue.data import Texts, load_texts  # noqa: E402
from glue.tasks import TASKS  # noqa: E402
from glue_support import FILES, VALIDATION, write_glue  # noqa: E402
from pretrain.errors import UsageError  # noqa: E402


def load(**flags: Any) -> Texts:
    names = ("task_name", "data_dir", "train_file", "validation_file", "max_train_samples")
    return load_texts(argparse.Namespace(**{name: flags.get(name) for name in names}))


def own_files(folder: Path, train: str, validation: str, suffix: str) -> dict[str, str]:
    """Two files with these contents, as the flags that name them."""
    paths = {"train_file": folder / f"train{suffix}", "validation_file": folder / f"dev{suffix}"}
    for path, text in zip(paths.values(), (train, validation), strict=True):
        path.write_text(text, encoding="utf-8")
    return {name: str(path) for name, path in paths.items()}


# ---------------------------------------------------------------- GLUE's folders


@pytest.mark.parametrize("task", sorted(TASKS))
def test_glue_folder_has_texts_and_labels_of_each_task(tmp_path: Path, task: str) -> None:
    texts = load(task_name=task, data_dir=str(write_glue(tmp_path, task)))
    found = {end: (split.texts, list(split.labels)) for end, split in texts.validation.items()}
    assert found == VALIDATION[task]
    assert len(texts.train) == len(FILES[task][f"{TASKS[task].folder}/train.tsv"]) - (task != "cola") - (task == "qqp")


def test_glue_folder_of_the_task_itself_is_the_same(tmp_path: Path) -> None:
    write_glue(tmp_path, "rte")
    assert (
        load(task_name="rte", data_dir=str(tmp_path / "RTE")).train
        == load(task_name="rte", data_dir=str(tmp_path)).train
    )


def test_glue_folder_counts_broken_rows(tmp_path: Path) -> None:
    texts = load(task_name="qqp", data_dir=str(write_glue(tmp_path, "qqp")))
    assert "1 broken rows left out" in texts.description and texts.train.labels == [1, 0]


def test_glue_mrpc_of_the_paraphrase_corpus_is_split_by_the_list_of_ids(tmp_path: Path) -> None:
    header = "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String\n"
    rows = ["1\t1\t2\tone\teins", "0\t3\t4\ttwo\tdrei", "1\t1\t4\tone\tone"]
    (tmp_path / "msr_paraphrase_train.txt").write_text(header + "\r\n".join(rows) + "\r\n", encoding="utf-8")
    (tmp_path / "dev_ids.tsv").write_text("3\t4\n")
    texts = load(task_name="mrpc", data_dir=str(tmp_path))
    assert texts.train.texts == (["one", "one"], ["eins", "one"]) and texts.train.labels == [1, 1]
    assert texts.validation[""].texts == (["two"], ["drei"])


def test_glue_mnli_without_mismatched_rows_has_the_matched_ones(tmp_path: Path) -> None:
    write_glue(tmp_path, "mnli")
    (tmp_path / "MNLI" / "dev_mismatched.tsv").unlink()
    assert list(load(task_name="mnli", data_dir=str(tmp_path)).validation) == [""]


def test_glue_folder_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nowhere is no folder"):
        load(task_name="rte", data_dir=str(tmp_path / "nowhere"))


def test_glue_folder_without_the_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="lacks the files of mnli: train.tsv and dev_matched.tsv"):
        load(task_name="mnli", data_dir=str(tmp_path))


def test_glue_mrpc_without_ids_is_refused(tmp_path: Path) -> None:
    (tmp_path / "msr_paraphrase_train.txt").write_text("Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t1\t2\ta\tb\n")
    with pytest.raises(UsageError, match="no dev_ids.tsv"):
        load(task_name="mrpc", data_dir=str(tmp_path))


def test_glue_file_with_other_columns_is_refused(tmp_path: Path) -> None:
    write_glue(tmp_path, "rte")
    (tmp_path / "RTE" / "dev.tsv").write_text("index\tsentence1\tlabel\n0\tx\tentailment\n")
    with pytest.raises(UsageError, match="lacks the column sentence2: there are index, sentence1, label"):
        load(task_name="rte", data_dir=str(tmp_path))


def test_glue_file_without_labels_is_refused(tmp_path: Path) -> None:
    write_glue(tmp_path, "rte")
    (tmp_path / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\n0\tx\ty\n")
    with pytest.raises(UsageError, match="lacks the column label"):
        load(task_name="rte", data_dir=str(tmp_path))


def test_glue_label_of_no_class_is_refused(tmp_path: Path) -> None:
    write_glue(tmp_path, "rte")
    (tmp_path / "RTE" / "dev.tsv").write_text("index\tsentence1\tsentence2\tlabel\n0\tx\ty\tperhaps\n")
    with pytest.raises(UsageError, match="the label 'perhaps' is none of entailment, not_entailment"):
        load(task_name="rte", data_dir=str(tmp_path))


def test_glue_score_that_is_no_number_is_refused(tmp_path: Path) -> None:
    write_glue(tmp_path, "stsb")
    path = tmp_path / "STS-B" / "dev.tsv"
    path.write_text(path.read_text().replace("3.6", "high"))
    with pytest.raises(UsageError, match="the label 'high' is no number"):
        load(task_name="stsb", data_dir=str(tmp_path))


# ---------------------------------------------------------------- files of one's own


@pytest.mark.parametrize(
    ("suffix", "train", "validation"),
    [
        (".tsv", "sentence\tlabel\nsay \"a\tham\nb\tspam\n", "sentence\tlabel\nc\tspam\n"),
        (".csv", 'sentence,label\n"say ""a",ham\nb,spam\n', "sentence,label\nc,spam\n"),
        (".json", '[{"sentence": "say \\"a", "label": "ham"}, {"sentence": "b", "label": "spam"}]',
         '[{"sentence": "c", "label": "spam"}]'),
        (".jsonl", '{"sentence": "say \\"a", "label": "ham"}\n{"sentence": "b", "label": "spam"}\n',
         '{"sentence": "c", "label": "spam"}\n'),
    ],
)  # fmt: skip
def test_own_files_of_each_kind_hold_the_same(tmp_path: Path, suffix: str, train: str, validation: str) -> None:
    texts = load(**own_files(tmp_path, train, validation, suffix))
    assert texts.train.texts == (['say "a', "b"],) and texts.train.labels == [0, 1]
    assert texts.validation[""].texts == (["c"],) and texts.validation[""].labels == [1]
    assert texts.labels == ("ham", "spam") and texts.metrics == ("accuracy",)


def test_own_csv_keeps_lines_inside_quotes(tmp_path: Path) -> None:
    files = own_files(tmp_path, 'sentence,label\n"two\nlines",0\nb,1\n', "sentence,label\nc,0\n", ".csv")
    assert load(**files).train.texts == (["two\nlines", "b"],)


@pytest.mark.parametrize("letter", ["\x0b", "\x85", "\u2028"])
def test_own_csv_rows_end_at_line_feeds_alone(tmp_path: Path, letter: str) -> None:
    files = own_files(tmp_path, f"sentence,label\na{letter}b,0\nc,1\n", "sentence,label\r\nd,1\r\n", ".csv")
    texts = load(**files)
    assert texts.train.texts == ([f"a{letter}b", "c"],) and texts.validation[""].labels == [1]


def test_tsv_texts_may_hold_a_carriage_return(tmp_path: Path) -> None:
    files = own_files(tmp_path, "sentence\tlabel\r\na\rb\t0\r\nc\t1\r\n", "sentence\tlabel\nd\t0\n", ".tsv")
    assert load(**files).train.texts == (["a\rb", "c"],)


def test_own_json_may_name_its_columns_in_another_order(tmp_path: Path) -> None:
    rows = '{"a": "x", "b": "z", "label": 0}\n{"a": "y", "b": "z", "label": 1}\n'
    texts = load(**own_files(tmp_path, rows, '{"label": 1, "b": "v", "a": "u"}\n', ".jsonl"))
    assert texts.validation[""].texts == (["u"], ["v"])


@pytest.mark.parametrize("rows", ["x,+1\ny,-1\n", "x,+1 \ny,-1 \n"])
def test_own_labels_with_signs_and_spaces_are_classes(tmp_path: Path, rows: str) -> None:
    texts = load(**own_files(tmp_path, "text,label\n" + rows, "text,label\nz,+1\n", ".csv"))
    assert texts.labels == ("-1", "+1") and texts.train.labels == [1, 0] and texts.validation[""].labels == [1]


def test_own_files_with_decimal_labels_are_a_regression(tmp_path: Path) -> None:
    texts = load(**own_files(tmp_path, "sentence,label\na,1\nb,0.5\n", "sentence,label\nc,2\n", ".csv"))
    assert texts.labels == () and texts.metrics == ("pearson", "spearmanr")
    assert texts.train.labels == [1.0, 0.5] and texts.validation[""].labels == [2.0]


def test_own_classes_of_whole_numbers_are_sorted_as_numbers(tmp_path: Path) -> None:
    rows = "".join(f"t,{label}\n" for label in (10, 9, -1))
    texts = load(**own_files(tmp_path, "text,label\n" + rows, "text,label\nt,10\n", ".csv"))
    assert texts.labels == ("-1", "9", "10") and texts.train.labels == [2, 1, 0] and texts.validation[""].labels == [2]


def test_own_labels_true_and_false_are_classes(tmp_path: Path) -> None:
    train = json.dumps([{"text": "a", "label": True}, {"text": "b", "label": False}])
    assert load(**own_files(tmp_path, train, train, ".json")).labels == ("False", "True")


@pytest.mark.parametrize(
    ("header", "row", "expected"),
    [
        ("idx,sentence2,sentence1,label", "7,b,a,x", (["a"], ["b"])),
        ("idx,question,answer,more,label", "7,q,a,m,x", (["q"], ["a"])),
        ("label,idx,text", "x,7,t", (["t"],)),
    ],
)
def test_own_text_columns_are_found(tmp_path: Path, header: str, row: str, expected: tuple[list[str], ...]) -> None:
    other = row.replace("x", "y")
    texts = load(**own_files(tmp_path, f"{header}\n{row}\n{other}\n", f"{header}\n{row}\n", ".csv"))
    assert texts.validation[""].texts == expected


def test_own_files_of_a_task_have_its_columns_labels_and_metrics(tmp_path: Path) -> None:
    row = {"sentence1": "a", "sentence2": "b", "label": 1, "idx": 0}
    text = json.dumps([row, {**row, "label": "not_equivalent"}])
    texts = load(task_name="mrpc", **own_files(tmp_path, text, text, ".json"))
    assert texts.train.labels == [1, 0] and texts.metrics == ("accuracy", "f1")


def test_own_training_rows_can_be_fewer(tmp_path: Path) -> None:
    files = own_files(tmp_path, "text,label\na,0\nb,1\nc,0\n", "text,label\na,0\nb,1\n", ".csv")
    texts = load(**files, max_train_samples=2)
    assert texts.train.texts == (["a", "b"],) and texts.train.labels == [0, 1] and len(texts.validation[""]) == 2


@pytest.mark.parametrize(
    ("train", "validation", "suffix", "message"),
    [
        ("a,label\nx,0\ny,1\n", "b,label\nx,0\n", ".csv", "different columns: a, label and b, label"),
        ("a,b\nx,0\n", "a,b\nx,0\n", ".csv", "no column label, only a, b"),
        ("idx,label\n1,0\n", "idx,label\n1,0\n", ".csv", "no column of texts besides idx, label"),
        ("a,label\nx,0\nx,0\n", "a,label\nx,0\n", ".csv", "one label only, 0"),
        ("a,label\nx,0\ny,1\n", "a,label\nx,2\n", ".csv", "the label '2' is none of 0, 1"),
        ("a,label\nx,0.5\n", "a,label\nx,much\n", ".csv", "the label 'much' is no number"),
        ("a,label\nx,0,1\n", "a,label\nx,0\n", ".csv", "row 2 has 3 columns, the first one 2"),
        ("a,label\n", "a,label\nx,0\n", ".csv", "train.csv has no rows"),
        ("", "a,label\nx,0\n", ".csv", "train.csv has no rows"),
        ("{", "{", ".json", "train.json is not JSON"),
        ("[1]", "[1]", ".json", "must hold objects"),
        ('{"a": "x", "label": 0}\n{"b": "x", "label": 0}', "", ".jsonl", "other keys than the first one .a, label."),
        ('{"a": null, "label": 0}\n{"a": "x", "label": 1}', '{"a": "x", "label": 1}', ".jsonl", "a row without text"),
        (
            '{"a": "x", "label": null}\n{"a": "x", "label": 1}',
            '{"a": "x", "label": 1}',
            ".jsonl",
            "a row without a label",
        ),
        ("a,label\nx,\ny,1\n", "a,label\nx,1\n", ".csv", "the column label has a row without a label"),
        ("a,label\nx,nan\ny,0.5\n", "a,label\nx,1\n", ".csv", "the label 'nan' is no number"),
        ('{"a": "x", "label": Infinity}', '{"a": "x", "label": 1}', ".jsonl", "the label inf is no number"),
        ("a,label\n" + "x" * 200_000 + ",0\n", "a,label\nx,0\n", ".csv", "train.csv is not CSV: field larger"),
        ("[" * 100_000, "[]", ".json", "train.json is not JSON"),
    ],
)
def test_own_files_that_do_not_fit_are_refused(
    tmp_path: Path, train: str, validation: str, suffix: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        load(**own_files(tmp_path, train, validation, suffix))


def test_own_file_that_is_missing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read .*nothing.csv: No such file"):
        load(train_file=str(tmp_path / "nothing.csv"), validation_file=str(tmp_path / "nothing.csv"))


def test_own_file_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"text,label\n\xff,0\n")
    with pytest.raises(UsageError, match="a.csv is not UTF-8"):
        load(train_file=str(tmp_path / "a.csv"), validation_file=str(tmp_path / "a.csv"))


# ---------------------------------------------------------------- the hub


def test_hub_data_set_is_read_by_its_own_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(path: str, name: str) -> Any:
        assert (path, name) == ("glue", "mnli")
        rows = {"premise": ["p"], "hypothesis": ["h"], "label": [2], "idx": [0]}
        part = datasets.Dataset.from_dict(rows)
        return {"train": part, "validation_matched": part, "validation_mismatched": part}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    texts = load(task_name="mnli")
    assert texts.train.texts == (["p"], ["h"]) and texts.train.labels == [2]
    assert list(texts.validation) == ["", "_mm"]


def test_hub_out_of_reach_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*_: str) -> Any:
        raise ConnectionError("Couldn't reach the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UsageError, match=r"from the hub \(Couldn't reach the Hub\); --data_dir takes local files"):
        load(task_name="cola")


def test_fingerprint_changes_with_a_label_and_with_a_text(tmp_path: Path) -> None:
    start, end = "text,label\n", "text,label\nt,0\n"
    found = {
        load(**own_files(tmp_path, start + rows, end, ".csv")).fingerprint()
        for rows in ("a,0\nb,1\n", "a,1\nb,0\n", "a,0\nc,1\n")
    }
    assert len(found) == 3
