"""Three updates of LLaMA-7B on a CPU in 16 GB, then one more from the checkpoint: losses, peak memory, seconds.

    python benchmarks/pretrain_7b.py                       # 7B; an hour on two cores, 24 GB of disk
    python benchmarks/pretrain_7b.py --model_config my.json --output my_results.json

Each of the two runs is a process of its own, whose peak resident set (all of it: Python, PyTorch, the corpus) is the
kernel's figure. Writes ``results/pretrain_7b.json`` with the flags, for each update loss and seconds, for each part of
the work seconds and the peak at its end. It is no part of any test; the tests train the same way with a small model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
EXAMPLES = HERE.parent / "examples"
GIGABYTE = 10**9
PUBLISHED_PEAK = 15.26  # GB on a GPU at batch size 16, as the public code's README has it

FLAGS = """--optimizer q_galore_adamw8bit_per_layer --weight_quant --stochastic_round --proj_quant --rank 1024
    --activation_checkpointing --batch_size 1 --max_length 256 --gradient_accumulation 1 --dtype bfloat16
    --lr 0.0002 --scheduler constant --warmup_steps 0 --galore_scale 0.25 --update_proj_gap 500
    --eval_tokens 512 --log_every 1 --unset_wandb""".split()
PARTS = (
    "build_model", "load_corpus", "prepare", "build_optimizer", "load_training_state", "load_model", "save_checkpoint",
    "evaluate",
)  # fmt: skip


def peak() -> int:
    """Largest resident set of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def run_watched(arguments: list[str], report: Path) -> int:
    """Run run_pretrain.py in this process, and write how long its parts took; returns its exit code."""
    sys.path.insert(0, str(EXAMPLES))
    import run_pretrain

    parts: list[dict[str, Any]] = []

    def watch(owner: Any, name: str) -> None:
        function = getattr(owner, name)

        def watched(*args: Any, **keywords: Any) -> Any:
            start = time.perf_counter()
            result = function(*args, **keywords)
            seconds = time.perf_counter() - start
            parts.append({"part": name, "seconds": round(seconds, 1), "peak_GB": round(peak() / GIGABYTE, 3)})
            report.write_text(json.dumps({"parts": parts, "peak_bytes": peak()}))
            print(f"{name}: {seconds:.1f} s, peak {peak() / GIGABYTE:.2f} GB", flush=True)
            return result

        setattr(owner, name, watched)

    for name in PARTS:
        watch(run_pretrain, name)
    watch(run_pretrain.Trainer, "update")
    return int(run_pretrain.main(arguments))


def measure(arguments: list[str], folder: Path, label: str) -> dict[str, Any]:
    """One process of training: its log and what it used."""
    report = folder / f"{label}.json"
    command = [sys.executable, __file__, "--watched", str(report), *arguments]
    start = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(HERE.parent)})
    seconds = time.perf_counter() - start
    return {"seconds": round(seconds, 1), **json.loads(report.read_text())}


def main() -> None:
    """Both runs, and the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_config", default=str(EXAMPLES / "configs" / "llama_7b.json"))
    parser.add_argument("--output", default=str(HERE / "results" / "pretrain_7b.json"))
    parser.add_argument("--folder", help="where the checkpoints go and stay; default: a temporary folder")
    args = parser.parse_args()
    folder = Path(args.folder or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    flags = ["--model_config", str(Path(args.model_config).resolve()), *FLAGS, "--save_dir", str(folder / "run")]
    first = measure([*flags, "--num_training_steps", "3"], folder, "first")
    more = ["--num_training_steps", "4", "--continue_from", str(folder / "run" / "model_3")]
    second = measure([*flags, *more], folder, "second")
    records = [json.loads(line) for line in (folder / "run" / "log.jsonl").read_text().splitlines()]
    kept = ("kind", "step", "loss", "grad_norm", "lr", "refreshes", "weights", "gradients", "optimizer_state")
    result = {
        "command": " ".join(["run_pretrain.py --model_config", f"configs/{Path(args.model_config).name}", *FLAGS]),
        "machine": machine(),
        "log": [{key: row[key] for key in kept if key in row} for row in records if row["kind"] != "telemetry"],
        "three_updates": first,
        "one_more_from_the_checkpoint": second,
        "checkpoint_bytes": sum(file.stat().st_size for file in (folder / "run" / "model_4").iterdir()),
        "peak_GB": max(first["peak_bytes"], second["peak_bytes"]) / GIGABYTE,
        "published_peak_GB": PUBLISHED_PEAK,
        "planned_bytes": planned_bytes(args.model_config),
    }
    Path(args.output).write_text(json.dumps(result, indent=1) + "\n")
    if args.folder is None:
        shutil.rmtree(folder)
    print(f"peak {result['peak_GB']:.2f} GB (published for a GPU: {PUBLISHED_PEAK}); {args.output}")


def planned_bytes(config: str) -> dict[str, int | None]:
    """What the planner predicts of the same run, by part: tensors alone, without Python, PyTorch and the corpus."""
    import q_galore_torch as qg

    plan = qg.plan_memory(
        config, 1024, batch=1, tokens=256, per_layer=True, activation_checkpointing=True, update_proj_gap=500
    )
    return {**dataclasses.asdict(plan), "tracked": plan.tracked, "total": plan.total}


def machine() -> dict[str, Any]:
    """What was measured on."""
    import torch

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "cpu": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


if __name__ == "__main__":
    if sys.argv[1:2] == ["--watched"]:
        sys.exit(run_watched(sys.argv[3:], Path(sys.argv[2])))
    main()
