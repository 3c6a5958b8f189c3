"""Runs of examples/run_pretrain.py one after the other in the same processes: a list of command lines as JSON."""

from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
import run_pretrain  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")  # one for all runs: the next would find the addresses of the one before
    for line in json.loads(Path(sys.argv[1]).read_text()):
        code = run_pretrain.main(line)
        print(f"process {os.environ['RANK']} ends with {code}", flush=True)
        if code:
            sys.exit(code)
    gc.collect()  # as examples/pretrain/processes.py does
    dist.destroy_process_group()
