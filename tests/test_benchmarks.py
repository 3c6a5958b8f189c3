"""The measurement programs of benchmarks/: their arithmetic by hand, and each of them once on a tiny model."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import q_galore_torch as qg
from q_galore_torch import subspace
from q_galore_torch.optim import schedule

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))
import bench_gpu  # noqa: E402
import bench_memory  # noqa: E402
import bench_train  # noqa: E402
import gpu_check  # noqa: E402
import recorded_gradients as recorded  # noqa: E402
import small_models  # noqa: E402
import subspace_runs as runs  # noqa: E402
import tables  # noqa: E402

SLOTS = 60


def program(main: Any, monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """Run a program's main in this process."""
    monkeypatch.setattr(sys, "argv", ["program", *map(str, arguments)])
    main()


def spectrum(values: list[float], rows: int = 12, seed: int = 0) -> tuple[Tensor, Tensor]:
    """A float64 gradient [rows, len(values)] with these singular values, and its right singular vectors as rows."""
    generator = torch.Generator().manual_seed(seed)
    size = len(values)
    left, right = (torch.linalg.qr(torch.randn(n, size, generator=generator).double()).Q for n in (rows, size))
    return left @ torch.diag(torch.tensor(values).double()) @ right.t(), right.t()


def matrix(gradients: list[Tensor], rank: int) -> recorded.Matrix:
    """A recording in which every gradient is followed by itself."""
    return recorded.Matrix("matrix", 0, subspace.RIGHT, rank, gradients, gradients)


# ---------------------------------------------------------------- tables


def test_mean_and_error_of_few_values() -> None:
    assert tables.mean_and_error([], 2) == ""
    assert tables.mean_and_error([0.5], 2) == "0.50"
    assert tables.mean_and_error([1.0, 3.0], 2) == "2.00 ± 1.00"  # deviation sqrt(2), error sqrt(2) / sqrt(2)
    assert tables.mean_and_error([-0.25, 0.75], 3, signed=True) == "+0.250 ± 0.500"


def test_a_table_replaces_what_stands_between_its_marks(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- one -->\nold\n<!-- end of one -->\nafter\n<!-- two --><!-- end of two -->\n")
    table = tables.markdown(["name", "loss"], [["a", "1"]])
    for _ in range(2):
        tables.rewrite(page, "one", table)
    text = page.read_text()
    assert text.startswith("before\n<!-- one -->\n\n| name | loss |\n| --- | ---: |\n| a | 1 |\n\n<!-- end of one -->")
    assert text.endswith("after\n<!-- two --><!-- end of two -->\n") and "old" not in text


@pytest.mark.parametrize("text", ["<!-- one -->\n", "<!-- end of one -->\n<!-- one -->\n", ""])
def test_a_page_without_both_marks_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ValueError, match=r"page\.md needs the lines <!-- one --> and <!-- end of one -->"):
        tables.rewrite(page, "one", "table")
    assert page.read_text() == text


# ---------------------------------------------------------------- energies and the rule


def test_energy_is_the_share_of_the_singular_values() -> None:
    gradient, vectors = spectrum([4.0, 2.0, 1.0, 0.5])
    total = 16 + 4 + 1 + 0.25
    assert recorded.energy(gradient, vectors[:2]) == pytest.approx(20 / total, rel=1e-12)
    skewed = torch.tensor([[3.0, 1.0], [0.5, 2.0]]).double() @ vectors[1:3]  # the same span, not orthonormal
    assert recorded.energy(gradient, skewed) == pytest.approx(5 / total, rel=1e-12)
    assert recorded.energy(gradient, recorded.exact_basis(gradient, 3)) == pytest.approx(21 / total, rel=1e-12)


def test_similarity_by_hand() -> None:
    gradient, vectors = spectrum([4.0, 2.0, 1.0, 0.5])
    total, chance = 21.25, 0.25
    ratio = (4 / total - chance) / (16 / total - chance)
    assert ratio < 0 and recorded.similarity(gradient, vectors[1:2], vectors[:1]) == 0
    pair = recorded.similarity(gradient, vectors[[0, 3]], vectors[:2])
    assert pair == pytest.approx((16.25 / total - 0.5) / (20 / total - 0.5), rel=1e-9)
    assert recorded.similarity(gradient, vectors[:2], vectors[[0, 3]]) == 1
    flat = spectrum([1.0] * 4)[0]  # any two vectors capture half of it: noise
    assert recorded.similarity(flat, vectors[:2], vectors[:2]) == 0


def test_rule_stretches_on_a_full_queue_and_returns_on_a_low_similarity() -> None:
    queue: deque[float] = deque(maxlen=recorded.QUEUE)
    gaps, gap = [], 1
    for value in [0.9] * 5 + [0.9] * 4 + [0.8, 0.9]:
        gap = recorded.stretched(gap, queue, value, 0.85)
        gaps.append(gap)
    assert gaps == [1] * 4 + [2] * 5 + [1] + [2]  # the queue 0.9 0.9 0.9 0.8 0.9 has a mean of 0.88
    assert not queue
    queue.extend([1.0] * 4)
    assert recorded.stretched(16, queue, 1.0, 0.85) == 16  # the cap


def test_simulated_rule_on_gradients_that_stay_and_on_ones_that_change() -> None:
    still = spectrum([8.0, 4.0, 2.0, 1.0] + [0.01] * 12, rows=20)[0].float()
    # 1 first basis, then 5 dates each at gaps 1, 2 and 4 (slots 1-5, 7-15, 19-35), then slots 43, 51 and 59.
    assert recorded.simulated(matrix([still] * SLOTS, 4), 0.85) == 1 + 5 + 5 + 5 + 3
    moving = [spectrum([8.0, 4.0, 2.0, 1.0] + [0.01] * 12, 20, seed)[0].float() for seed in range(SLOTS)]
    assert recorded.simulated(matrix(moving, 4), 0.85) == SLOTS


def test_chain_keeps_the_stored_basis_and_exact_bases_reach_one() -> None:
    gradients = [spectrum([8.0, 4.0, 2.0, 1.0] + [0.01] * 12, 20)[0].float()] * 7
    links = list(recorded.chain(matrix(gradients, 4), 3))
    assert [link.slot for link in links] == [0, 3, 6] and links[0].old is None
    torch.testing.assert_close(links[1].old, recorded.stored(links[0].new.vectors), rtol=0, atol=0)
    result = recorded.bases(10, iter([matrix(gradients, 4)]))
    rows = result["ratio"]
    assert rows["warm, gap 10, float32"]["count"] == 6 and rows["warm, gap 50, float32"]["count"] == 1
    assert all(row["minimum"] > 0.999 and row["maximum"] < 1 + 1e-6 for row in rows.values())
    assert result["qr fallbacks"] == dict.fromkeys(rows, 0)


def test_left_side_of_a_transposed_gradient_is_the_right_side() -> None:
    gradients = [spectrum([8.0, 4.0, 2.0, 1.0] + [0.5] * 12, 20, seed)[0].float() for seed in range(6)]
    right = matrix(gradients, 4)
    left = right._replace(side=subspace.LEFT, gradients=[g.t().contiguous() for g in gradients])
    left = left._replace(following=left.gradients)
    for part in (recorded.bases, recorded.formats):
        ratios = [part(10, iter([each]))["ratio"] for each in (right, left)]
        for name, row in ratios[0].items():
            assert ratios[1][name] == pytest.approx(row, abs=1e-3), name
    assert recorded.simulated(right, 0.85) == recorded.simulated(left, 0.85)


def test_agreement_of_decisions_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    gradients = [spectrum([8.0, 4.0, 2.0, 1.0] + [0.01] * 12, 20)[0].float()] * 5
    values = iter([0.9, 0.95, 0.5, 0.7, 0.88, 0.7, 0.9, 0.9])  # warm, exact, warm, ...
    monkeypatch.setattr(recorded, "similarity", lambda *_: next(values))
    monkeypatch.setattr(recorded, "MULTIPLES", (1,))
    row = recorded.similarities(10, iter([matrix(gradients, 4)]))["gap 10"]
    assert (
        row["agreement"]["0.85"] == 0.75
        and row["agreement below"]["0.85"] == 0.5
        and row["share above"]["0.85"] == 0.75
    )
    assert row["agreement"]["0.6"] == 0.75 and row["agreement below"]["0.6"] is None


# ---------------------------------------------------------------- models and lists of runs


def test_window_model_sees_the_last_16_bytes_and_nothing_else() -> None:
    model = small_models.seeded_model("window", 0)
    tokens = torch.randint(0, 256, (1, 40))
    changed = tokens.clone()
    changed[0, 20] = (tokens[0, 20] + 1) % 256
    with torch.no_grad():
        moved = (model.model(tokens) - model.model(changed)).abs().amax(dim=2)[0]
    assert (moved > 0).nonzero().flatten().tolist() == list(range(20, 36))


def line(setting: runs.Setting, loss: float, refreshes: int) -> dict[str, Any]:
    held_out = {str(setting.steps): loss}
    return {"key": setting.key, "setting": {"steps": setting.steps}, "held_out": held_out, "refreshes": refreshes}


def test_lists_share_runs_and_seeds_are_compared_in_pairs() -> None:
    moments = {setting.key for setting in runs.moments_list(2, 600)}
    assert len(moments) == 14
    assert len(moments & {setting.key for setting in runs.bases_list(2, 600)}) == 4  # warm and svd, two seeds each
    base = [runs.Setting("llama", {"a": 1}, seed=seed) for seed in range(3)]
    other = [runs.Setting("llama", {"a": 2}, seed=seed) for seed in range(3)]
    losses = [line(s, 1.0 + s.seed, 100) for s in base] + [line(s, 1.1 + 1.2 * s.seed, 25) for s in other[:2]]
    table = runs.compared({record["key"]: record for record in losses}, [("one", base), ("two", other)], base)
    assert table[0][1:4] == ["3", "2.0000 ± 0.5774", "+0.0000 ± 0.0000"]
    assert table[1] == ["two", "2", "1.7000 ± 0.6000", "+0.2000 ± 0.1000", "25 ± 0", "25.0 ± 0.0 %"]


def test_log_passes_over_a_torn_line_and_starts_a_new_one_behind_it(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text('{"key": "a", "x": 1}\n{"key": "b", "x"')
    assert list(runs.read_log(log)) == ["a"]
    runs.append_record(log, {"key": "c"})
    assert list(runs.read_log(log)) == ["a", "c"]


def test_lists_run_once_and_say_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    log = tmp_path / "log.jsonl"
    program(runs.main, monkeypatch, "all", "--quick", "--seeds", 1, "--log", log)
    output = capsys.readouterr().out
    records = [json.loads(text) for text in log.read_text().splitlines()]
    settings = {runs.tiny(s).key for make, _ in runs.LISTS.values() for s in make(1, 600)}
    assert len(records) + output.count("not run: ") == len(settings) == 16
    assert {record["key"] for record in records} <= settings
    for record in records:
        assert set(record["held_out"]) == {"4", "8", "12"} and all(map(math.isfinite, record["held_out"].values()))
        assert len(record["matrices"]) == 14 and record["refreshes"] == sum(m["refreshes"] for m in record["matrices"])
        assert record["refreshes"] > 14 and record["machine"]["torch"] == torch.__version__
    program(runs.main, monkeypatch, "all", "--quick", "--seeds", 1, "--log", log)
    assert [json.loads(text) for text in log.read_text().splitlines()] == records


def test_a_diverged_run_does_not_stop_the_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = [runs.Setting("tiny", {"a": number}) for number in range(2)]

    def train(setting: runs.Setting) -> dict[str, Any]:
        if setting == settings[0]:
            raise qg.NonFiniteGradientError("the gradient of x holds a NaN")
        return {**line(setting, 1.0, 2), "seconds": 0}

    monkeypatch.setattr(runs, "train", train)
    assert runs.run_all(settings, tmp_path / "log.jsonl") == ["tiny a=0 seed=0: the gradient of x holds a NaN"]
    assert list(runs.read_log(tmp_path / "log.jsonl")) == [settings[1].key]


def test_full_gradients_reach_the_callback_and_change_nothing() -> None:
    setting = runs.tiny(runs.Setting("llama", {"subspace": "warm", "lazy_rule": "fixed"}, {"grad_mode": "full"}))
    seen: list[dict[str, list[int]]] = []

    def look(step: int, gradients: dict[str, Tensor]) -> None:
        assert step == len(seen)
        seen.append({name: list(gradient.shape) for name, gradient in gradients.items()})

    watched, alone = runs.train(setting, look, quiet=True), runs.train(setting, quiet=True)
    assert watched["held_out"] == alone["held_out"]
    assert len(seen) == 12 and seen[0]["model.layers.1.mlp.gate_proj.weight"] == [48, 32] and len(seen[0]) == 14


def test_recordings_stay_out_of_the_repository(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    with pytest.raises(SystemExit):
        program(recorded.main, monkeypatch, "record", ROOT / "benchmarks" / "results", "--quick")
    assert "must lie outside the repository" in capsys.readouterr().err


def test_recording_is_analysed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    log = tmp_path / "log.jsonl"
    program(recorded.main, monkeypatch, "record", tmp_path, "--quick")
    files = sorted(int(path.stem) for path in (tmp_path / "tiny").glob("*.pt"))
    assert files == [step for s in range(0, 26, 2) for step in (s, s + 1)]
    for _ in range(2):
        program(recorded.main, monkeypatch, "analyse", tmp_path, "--model", "tiny", "--log", log)
    parts = {record["part"]: record["result"] for record in map(json.loads, log.read_text().splitlines())}
    assert list(parts) == list(recorded.PARTS) and len(log.read_text().splitlines()) == 4
    ratio = parts["bases"]["ratio"]["warm, gap 2, float32"]
    assert ratio["count"] == 14 * 12 and 0.9 < ratio["minimum"] <= ratio["maximum"] < 1 + 1e-6
    assert parts["formats"]["ratio"]["float32"]["minimum"] == pytest.approx(1, abs=1e-9)
    assert parts["formats"]["ratio"]["int4, block 256"]["minimum"] < 0.9999
    assert parts["similarity"]["all"]["refreshes"] == 14 * (12 + 6 + 2 + 1)
    assert parts["rule"]["fixed"] == 14 * 13 and max(parts["rule"]["share"].values()) <= 1
    capsys.readouterr()
    program(recorded.main, monkeypatch, "tables", "--log", log)
    assert capsys.readouterr().out.count("| tiny, 8 |") == sum(
        [len(parts["bases"]["ratio"]), len(parts["formats"]["ratio"]), len(parts["similarity"]), 1]
    )


def test_the_page_has_a_place_for_every_table() -> None:
    text = tables.PAGE.read_text()
    names = ["moments", "lazy-llama", "lazy-window", "bases", "sides", *(f"recorded-{part}" for part in recorded.PARTS)]
    for name in names:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- end of {name} -->") == 1


# ---------------------------------------------------------------- training updates and their memory


def test_training_contest_runs_every_contestant(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    program(bench_train.main, monkeypatch, "--quick", "--no-memory", "--rounds", 1, "--tokens", 32, "--threads", 2)
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {name:34s} ") == 4 for name in bench_train.CONTESTANTS)  # two models, two dtypes


def test_memory_of_a_contestant_is_weights_gradients_and_state(monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    count = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32
    words = ("--quick", "--models", "block", "--dtypes", "float32", "--tokens", 32, "--alone")
    found = {}
    for name in bench_train.CONTESTANTS:
        program(bench_train.main, monkeypatch, *words, name)
        found[name] = json.loads(capsys.readouterr().out)
    positions = 2 * 4 * 256 * 16  # cosines and sines
    assert found["AdamW(fused)"]["steady"] == 4 * 4 * count + 9 * 4 + positions  # and nine step counts
    int8, per_layer = (found[f"low-rank, INT8 weights{kind}"] for kind in ("", ", per layer"))
    assert per_layer["steady"] < int8["steady"] < found["low-rank, float weights"]["steady"]
    assert all(row["steady"] <= row["largest"] < row["rss"] for row in found.values())
    assert int8["largest"] > int8["steady"]  # the first bases' full gradients


def test_planner_agrees_with_training(tmp_path: Path, capsys: Any) -> None:
    shape = dict(vocab_size=264, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=2)
    (tmp_path / "config.json").write_text(json.dumps(shape))
    table = bench_memory.compared(str(tmp_path / "config.json"), 16, 4, list(bench_memory.MODES))
    assert all(abs(row["difference"]) < 0.005 for row in table.values()) and len(table) == 8
    assert capsys.readouterr().out.count(" MB") == 16


# ---------------------------------------------------------------- a GPU's


def test_bench_gpu_runs_on_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    """Its figures mean nothing there, but every contestant and kernel runs."""
    words = ["--device", "cpu", "--quick", "--tokens", "16", "--rounds", "1", "--models", "60m", "layer"]
    bench_gpu.main(words)
    printed = capsys.readouterr().out
    assert all(printed.count(f"  {name:34s} ") == 2 for name in bench_gpu.CONTESTANTS)
    rates = re.findall(r"^  (\w.*?)  +([\d.]+)  +([\d.]+)$", printed.partition("A refresh")[0], re.M)
    assert rates[0] == ("copy", rates[0][1], "1.00")
    assert len(rates) == 10 and all(float(rate) > 0 for _, rate, _ in rates)


def test_bench_gpu_times_no_refresh(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a gap of 200 one of 168 matrices is due in almost every step; here, of 14 at a gap of 10, one or more."""
    timed: list[bool] = []
    made: list[bool] = []
    refresh = schedule.refresh

    def counted(*args: Any, **options: Any) -> bool:
        made.append(bool(timed))
        return refresh(*args, **options)

    class Clock(bench_gpu.Clock):
        def seconds(self, run: Callable[[], object], rounds: int, warmup: int = 2) -> float:
            for _ in range(warmup):
                run()
            timed.append(True)
            seconds = super().seconds(run, rounds, 0)
            timed.clear()
            return seconds

    monkeypatch.setattr(schedule, "refresh", counted)
    monkeypatch.setattr(bench_train, "GAP", 10)
    case = bench_gpu.Case(bench_gpu.LlamaConfig(64, 16, 24, 2, 2), 4, False)
    row = bench_gpu.trained(case, "low-rank, INT8 weights", 16, 3, Clock(torch.device("cpu")))
    assert made and not any(made)
    assert row["refresh_ms"] > 0


def test_bench_gpu_waits_for_the_first_bases_of_large_models() -> None:
    assert bench_gpu.warmup(torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))])) == bench_train.WARMUP
    weights = [torch.nn.Parameter(torch.zeros(8, 8)) for _ in range(168)]
    assert bench_gpu.warmup(qg.QGaLoreAdamW8bit([{"params": weights, "rank": 2}])) == 23


def test_bench_gpu_goes_on_where_a_model_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> dict[str, float]:
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(bench_gpu, "trained", full)
    table = bench_gpu.model_table(bench_gpu.CASES["1b"], 16, 1, bench_gpu.Clock(torch.device("cpu")))
    assert table == {name: {"failed": "out of memory"} for name in bench_gpu.CONTESTANTS}


def test_gpu_check_without_a_gpu_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu_check.main([]) == 2
    sentence = f"gpu-check needs a GPU, and torch {torch.__version__} finds none that it can use\n"
    assert capsys.readouterr().err == sentence


def test_gpu_check_without_torch_says_so() -> None:
    command = [sys.executable, "-S", str(ROOT / "benchmarks" / "gpu_check.py")]
    done = subprocess.run(command, capture_output=True, text=True, env={})
    assert done.returncode == 1
    assert done.stderr.startswith("gpu-check needs a Python with torch, name it: make gpu-check PYTHON=")
    assert done.stderr.count("\n") == 1


def test_gpu_check_runs_every_part_and_counts_failures(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        gpu_check.run([sys.executable, "-c", "raise SystemExit(3)"], 60)

    monkeypatch.setattr(gpu_check, "PARTS", {"first": fail, "second": lambda: None})
    assert gpu_check.check(["first", "second"]) == 1
    printed = capfd.readouterr().out
    assert re.search(r"^first +\d+ s  FAILED: python\S* -c raise SystemExit\(3\) ended with status 3$", printed, re.M)
    assert re.search(r"^second +\d+ s  passed$", printed, re.M)
    assert gpu_check.check(["second"]) == 0


def test_gpu_check_names_a_tool_that_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    with pytest.raises(gpu_check.Failed, match="compute-sanitizer was found neither on PATH nor in "):
        gpu_check.tool("compute-sanitizer")


def test_gpu_check_runs_tests_that_exist() -> None:
    assert all((ROOT / f"tests/test_{name}.py").exists() for name in gpu_check.TESTS)
