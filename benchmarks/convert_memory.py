"""Peak memory of making a pretrained model an INT8 one: layer by layer, and from the whole float model.

    python benchmarks/convert_memory.py [--hidden N] [--layers N] [--shard SIZE] [--folder DIR] [--no-save]

A LLaMA of random bfloat16 weights is written by transformers in shards. Each contestant then runs in a fresh process,
whose peak is the kernel's VmHWM (ru_maxrss would be inherited from the process that starts it) less what the process
held when everything was imported. Pages of mapped files count as far as they are resident.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import timing
import torch

import q_galore_torch as qg

RANK = 256


def memory(field: str) -> int:
    """Bytes of a field of this process's status."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError(f"/proc/self/status has no {field}")


def write(folder: str, hidden: int, layers: int, shard: str) -> dict[str, Any]:
    """Make the model's files."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 256 * 256,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 96,
        num_key_value_heads=hidden // 96,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder, max_shard_size=shard)
    sizes = [parameter.nbytes for parameter in model.parameters()]
    return {"weights": qg.num_parameters(model), "float_bytes": sum(sizes), "largest_tensor": max(sizes)}


def layer_by_layer(folder: str, bits: int | None) -> torch.nn.Module:
    """What is measured."""
    from q_galore_torch.integrations.pretrained import from_pretrained

    return from_pretrained(folder, rank=RANK, target_modules="all-linear", weight_bits=bits)


def whole(folder: str, bits: int | None) -> torch.nn.Module:
    """What it is measured against."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    return qg.prepare_model(model, rank=RANK, target_modules="all-linear", weight_bits=bits)


CONTESTANTS = {"layer by layer": layer_by_layer, "from_pretrained + prepare_model": whole}


def measure(name: str, folder: str) -> dict[str, Any]:
    """Run one contestant in this process, which did nothing else."""
    import transformers
    from transformers import AutoModelForCausalLM, LlamaForCausalLM  # noqa: F401  (imported late otherwise)

    transformers.utils.logging.disable_progress_bar()
    before, start = memory("VmRSS"), time.perf_counter()
    model = CONTESTANTS[name](folder, 8)
    seconds = time.perf_counter() - start
    codes = sum(buffer.nbytes for buffer in model.buffers())
    floats = sum(p.nbytes for n, p in model.named_parameters() if not n.endswith("coordinates"))
    rest = {"model_bytes": codes + floats, "seconds": round(seconds, 2)}
    return {"imported": before, "peak": memory("VmHWM") - before, "after": memory("VmRSS") - before, **rest}


def child(*words: str) -> dict[str, Any]:
    """What another process of this script prints last."""
    done = subprocess.run([sys.executable, __file__, *words], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main(words: list[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=1536, help="a multiple of 96")
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--shard", default="200MB")
    parser.add_argument("--folder", help="where the model is written, default a temporary folder")
    parser.add_argument("--no-save", action="store_true", help="do not write the result")
    parser.add_argument("--run", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args(words)
    if given.run:
        name, folder = given.run
        result = write(folder, given.hidden, given.layers, given.shard) if name == "write" else measure(name, folder)
        print(json.dumps(result))
        return result
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        size = ["--hidden", str(given.hidden), "--layers", str(given.layers), "--shard", given.shard]
        record = {**child("--run", "write", folder, *size), "shard": given.shard, "rank": RANK}
        record["contestants"] = {name: child("--run", name, folder) for name in CONTESTANTS}
    print(f"{record['weights'] / 1e6:.0f}M weights, {record['float_bytes'] / 2**20:.0f} MiB in bfloat16; in MiB:")
    for name, row in record["contestants"].items():
        parts = " ".join(f"{key} {row[key] / 2**20:6.0f}" for key in ("peak", "after", "model_bytes"))
        print(f"  {name:34s} {parts}   {row['seconds']:.1f} s")
    if not given.no_save:
        timing.save("convert_memory", {"machine": timing.machine(), **record})
    return record


if __name__ == "__main__":
    main()
