"""Shared by the tests of examples/run_glue.py: small files in GLUE's layout, and a BERT of 20,000 weights."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"

# Task -> file -> its lines, as GLUE's download has them.
FILES: dict[str, dict[str, list[str]]] = {
    "cola": {
        "CoLA/train.tsv": ["gj04\t1\t\tOur friends won't buy this.", "gj04\t0\t*\tThey drank the pub."],
        "CoLA/dev.tsv": ['gj04\t1\t\tThe "sailors" rode', "gj04\t0\t*\tThe more does Bill smoke"],
    },
    "sst2": {
        "SST-2/train.tsv": ["sentence\tlabel", "hide new secretions \t0", "a great film \t1"],
        "SST-2/dev.tsv": ["sentence\tlabel", 'a "charming journey \t1', "bleak \t0"],
    },
    "mrpc": {
        "MRPC/train.tsv": [
            "\ufeffQuality\t#1 ID\t#2 ID\t#1 String\t#2 String",
            "1\t10\t11\tOne.\tUno.",
            "0\t12\t13\tA\tB",
        ],
        "MRPC/dev.tsv": ["Quality\t#1 ID\t#2 ID\t#1 String\t#2 String", '1\t20\t21\tHe said "no\tNo, he said'],
    },
    "stsb": {
        "STS-B/train.tsv": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain\tMSR\t2012\t1\tnone\tnone\tA plane.\tAn air plane.\t5.000",
            "1\tmain\tMSR\t2012\t4\tnone\tnone\tA man.\tA horse.\t0.250",
        ],
        "STS-B/dev.tsv": [
            "index\tgenre\tfilename\tyear\told_index\tsource1\tsource2\tsentence1\tsentence2\tscore",
            "0\tmain\tMSR\t2012\t0\tnone\tnone\tA hat.\tA hard hat.\t3.6",
        ],
    },
    "qqp": {
        "QQP/train.tsv": [
            "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate",
            "1\t2\t3\tHow?\tHow so?\t1",
            "a row that was torn",
            "2\t4\t5\tWhy?\tWhere?\t0",
        ],
        "QQP/dev.tsv": ["id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate", "9\t8\t7\tWho?\tWho is it?\t1"],
    },
    "mnli": {
        "MNLI/train.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tgold_label",
            "0\t1\t1n\tfiction\tIt rains.\tIt is wet.\tneutral\tentailment",
            "1\t2\t2n\tfiction\tIt rains.\tIt is cold.\tneutral\tneutral",
        ],
        "MNLI/dev_matched.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
            "0\t1\t1c\tslate\tHe left.\tHe stayed.\tneutral\tneutral\tcontradiction",
        ],
        "MNLI/dev_mismatched.tsv": [
            "index\tpromptID\tpairID\tgenre\tsentence1\tsentence2\tlabel1\tlabel2\tgold_label",
            "0\t1\t1c\tverbatim\tShe left.\tShe went.\tneutral\tneutral\tentailment",
            "1\t1\t1c\tverbatim\tShe left.\tShe sang.\tneutral\tneutral\tneutral",
        ],
    },
    "qnli": {
        "QNLI/train.tsv": ["index\tquestion\tsentence\tlabel", "0\tWhen?\tIn May.\tentailment"],
        "QNLI/dev.tsv": ["index\tquestion\tsentence\tlabel", "0\tWho?\tIn May.\tnot_entailment"],
    },
    "rte": {
        "RTE/train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tNo WMDs.\tWMDs found.\tnot_entailment"],
        "RTE/dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tDana died.\tDana is dead.\tentailment"],
    },
    "wnli": {
        "WNLI/train.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tI stuck a pin in.\tThe pin is in.\t1"],
        "WNLI/dev.tsv": ["index\tsentence1\tsentence2\tlabel", "0\tIt fell.\tHe fell.\t0"],
    },
}
# Task -> validation rows of the files above, by what stands behind the metrics' names: texts and labels.
VALIDATION: dict[str, dict[str, tuple[tuple[list[str], ...], list[float]]]] = {
    "cola": {"": ((['The "sailors" rode', "The more does Bill smoke"],), [1, 0])},
    "sst2": {"": ((['a "charming journey ', "bleak "],), [1, 0])},
    "mrpc": {"": ((['He said "no'], ["No, he said"]), [1])},
    "stsb": {"": ((["A hat."], ["A hard hat."]), [3.6])},
    "qqp": {"": ((["Who?"], ["Who is it?"]), [1])},
    "mnli": {
        "": ((["He left."], ["He stayed."]), [2]),
        "_mm": ((["She left.", "She left."], ["She went.", "She sang."]), [0, 1]),
    },
    "qnli": {"": ((["Who?"], ["In May."]), [1])},
    "rte": {"": ((["Dana died."], ["Dana is dead."]), [0])},
    "wnli": {"": ((["It fell."], ["He fell."]), [0])},
}

GOOD, BAD = "bright happy warm lovely".split(), "dark sad cold ugly".split()
OTHERS = "the day was and very a film with people".split()


def write_glue(folder: Path, task: str) -> Path:
    """GLUE's folder with the files of one task."""
    for name, lines in FILES[task].items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_sentences(folder: Path, rows: int = 48) -> list[str]:
    """Two files whose labels a few words give away; returns the flags that name them."""
    draw = random.Random(0)
    for name, count in (("train", rows), ("dev", 21)):
        lines = []
        for number in range(count):
            words = draw.choices(OTHERS, k=draw.randint(2, 6)) + draw.choices((BAD, GOOD)[number % 2], k=2)
            draw.shuffle(words)
            lines.append(json.dumps({"sentence": " ".join(words), "label": ("bad", "good")[number % 2]}))
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return ["--train_file", str(folder / "train.jsonl"), "--validation_file", str(folder / "dev.jsonl")]


def write_model(folder: Path, **config: Any) -> str:
    """A random BERT with a tokenizer of whole words."""
    transformers = pytest.importorskip("transformers")
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *OTHERS]
    (folder / "vocab.txt").write_text("\n".join(words) + "\n")
    transformers.BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    shape: dict[str, Any] = {
        "vocab_size": len(words), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
        "intermediate_size": 64, "max_position_embeddings": 32,
    }  # fmt: skip
    torch.manual_seed(0)
    transformers.BertForSequenceClassification(transformers.BertConfig(**{**shape, **config})).save_pretrained(folder)
    return str(folder)
