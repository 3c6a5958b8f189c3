#!/usr/bin/env python3
"""Pretrain a LLaMA with Q-GaLore, or with an optimizer to compare it with.

    python examples/run_pretrain.py --demo
    python run_pretrain.py --model_config configs/llama_60m.json --batch_size 16 --optimizer q_galore_adamw8bit \\
        --weight_quant --proj_quant --stochastic_round --rank 128 --lr 0.01
    torchrun --standalone --nproc_per_node 1 run_pretrain.py ...

``--help`` lists all flags and the exit codes. The support modules are in the folder ``pretrain`` beside this file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from pretrain.checkpoint import (
    find_checkpoint,
    load_model,
    load_training_state,
    restore_random_state,
    save_checkpoint,
)
from pretrain.data import held_out_batches, load_corpus
from pretrain.errors import UsageError
from pretrain.flags import parse_flags
from pretrain.losses import SummedLoss, evaluate
from pretrain.model import build_model, checkpoint_activations, initializer, read_config_json
from pretrain.optimizers import (
    PER_LAYER,
    build_optimizer,
    clip_of,
    is_prepared,
    prepare,
    ready_for_ddp,
    simulate_int8,
    update_per_layer,
)
from pretrain.processes import Processes
from pretrain.report import (
    MIB,
    NoLog,
    RunLog,
    give_back_freed_memory,
    gradient_bytes,
    peak_memory,
    peak_resident,
    plot_loss,
    start_wandb,
    state_bytes,
    weight_bytes,
)
from pretrain.schedules import make_scheduler
from pretrain.stopping import StopRequest
from pretrain.telemetry import SubspaceLog, count_refreshes

# Written into every checkpoint: a run can only be continued with the same values.
IDENTITY = (
    "seed", "dtype", "max_length", "tokenizer", "total_batch_size", "grad_clipping", "optimizer",
    "lr", "scheduler", "min_lr_ratio", "warmup_steps", "weight_decay", "beta1", "beta2", "rank", "update_proj_gap",
    "galore_scale", "proj_type", "proj_quant", "proj_bits", "proj_group_size", "weight_quant", "weight_bits",
    "weight_group_size", "stochastic_round", "simulation", "lazy_rule", "energy_threshold", "cos_threshold",
    "gamma_proj", "queue_size",
)  # fmt: skip

# A CPU gains nothing from more tokens at once, but the activations of 65,536 of them take 40 GB in a LLaMA-130M. The
# gradients of the parts add up to that of the micro-batch.
CPU_TOKENS_AT_ONCE = 8192


class TrainingFailed(Exception):
    """The run cannot go on: the loss is no longer a number, or a checkpoint cannot be written."""


class Trainer:
    """A run: everything that is saved in a checkpoint, and the loop over it."""

    def __init__(self, args: argparse.Namespace, stop: StopRequest, processes: Processes) -> None:
        self.args, self.stop, self.processes, self.device = args, stop, processes, args.torch_device
        self.stopped_by = 0  # the signal that all processes know of
        self.folder = Path(args.save_dir)
        if args.optimizer in PER_LAYER:
            give_back_freed_memory()
        self.resident_before = peak_resident()
        config = read_config_json(args.model_config)
        longest = config.get("max_sequence_length", config.get("max_position_embeddings"))
        if isinstance(longest, int) and args.max_length > longest:
            raise UsageError(f"--max_length {args.max_length} is more than the model's {longest}")
        prepared = is_prepared(args)
        torch.manual_seed(args.seed)
        self.model = build_model(args.model_config, args.use_hf_model, args.torch_dtype, on_meta=prepared)
        self.parameters = sum(p.numel() for p in self.model.parameters())
        with processes.first_alone():
            self.corpus = load_corpus(
                args.data_kind, args.data_path, args.tokenizer, args.max_length, args.seed, args.eval_tokens,
                vocabulary=self.model.lm_head.weight.shape[0], processes=processes,
            )  # fmt: skip
        if prepared:
            torch.manual_seed(args.seed)
            spread = self.model.config.initializer_range if args.continue_from is None else 0.0
            prepare(self.model, args, initializer(spread, args.torch_dtype))
        elif args.simulation and args.weight_quant:
            simulate_int8(self.model, args)
        self.model.to(self.device)
        if args.activation_checkpointing:
            checkpoint_activations(self.model)
        self.optimizer = build_optimizer(self.model, args)
        self.scheduler = make_scheduler(
            self.optimizer, args.scheduler, args.warmup_steps, args.num_training_steps, args.min_lr_ratio,
            args.cycle_length,
        )  # fmt: skip
        self.step, self.saved_at = 0, -1
        self.first_loss: float | None = None
        self.gradient_bytes = 0
        self.identity: dict[str, Any] = {
            "model": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16],
            "data": self.corpus.fingerprint[:16],
            **{name: getattr(args, name) for name in IDENTITY},
        }
        if args.continue_from is not None:
            self._restore(find_checkpoint(args.continue_from))
        self._connect()

    def _connect(self) -> None:
        """What is to happen to gradients: sums over the processes, updates in hooks."""
        args = self.args
        self.loss: torch.nn.Module = SummedLoss(self.model)
        self.ddp: DistributedDataParallel | None = None
        if self.processes.count > 1:
            ready_for_ddp(self.loss, args)
            self.loss = self.ddp = DistributedDataParallel(self.loss, gradient_as_bucket_view=True)
        at_once = args.batch_size if self.device.type == "cuda" else max(1, CPU_TOKENS_AT_ONCE // args.max_length)
        self.rows = min(args.batch_size, at_once)
        self.backwards = args.gradient_accumulation * -(-args.batch_size // self.rows)
        self.per_layer = None
        if args.optimizer in PER_LAYER:
            self.per_layer = update_per_layer(self.optimizer, args, self.backwards, self.ddp)

    def _restore(self, folder: Path) -> None:
        state = load_training_state(folder, self.identity)
        if state["step"] >= self.args.num_training_steps:
            raise UsageError(f"{folder} has all {state['step']} updates of --num_training_steps already")
        load_model(folder, self.model)
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        self.corpus.train.load_state_dict(state["data"])
        restore_random_state(state["random"])
        self.step, self.first_loss = state["step"], state["first_loss"]
        for group, base, factor in zip(
            self.optimizer.param_groups, self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True
        ):
            group["lr"] = base * factor(self.step)  # another one than was saved where --num_training_steps has grown

    def save(self) -> None:
        """Write a checkpoint of the current step, unless it is there already."""
        if self.saved_at == self.step:
            return
        state = {
            "identity": self.identity,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "data": self.corpus.train.state_dict(),
            "first_loss": self.first_loss,
        }
        problem, folder = "", self.folder
        if self.processes.rank == 0:
            try:
                folder = save_checkpoint(self.folder, self.step, self.model, state)
            except OSError as error:
                problem = f"cannot save a checkpoint in {self.folder}: {error.strerror}"
        if self.processes.largest(len(problem)):
            raise TrainingFailed(problem or "process 0 cannot save a checkpoint")
        self.saved_at = self.step
        self.log.line(f"saved {folder}")

    def run(self) -> int:
        """Train to the end or until asked to stop; returns the exit code."""
        args = self.args
        self.log = self._open_log()
        self.subspaces = SubspaceLog(self.optimizer, self.log.kept)
        try:
            self.log.record("run", self.step, name=args.name, flags=vars_for_log(args))
            self._log_subspaces()  # in a folder of its own, a continued run begins with what was done before
            self._introduce()
            if args.eval_at_start and self.step == 0:
                self.first_loss = self.evaluate()
            self._train()
            if entries := self.subspaces.entries():
                self.log.record("telemetry", self.step, parameters=entries)
            self.save()
            loss = None if self.stopped_by else self.evaluate()
            if self.stopped_by:
                self.log.line(f"stopped after update {self.step}; go on with --continue_from {self.folder}")
            else:
                self._summary(loss)
        finally:
            self.log.close()
        return 128 + self.stopped_by if self.stopped_by else 0  # as shells report a signal

    def _open_log(self) -> RunLog | NoLog:
        """The log of process 0; the others have none."""
        args = self.args
        log: RunLog | NoLog = NoLog()
        problem = ""
        if not self.processes.rank:
            wandb = start_wandb(args.unset_wandb, args.project, args.name, vars_for_log(args))
            try:
                log = RunLog(self.folder, args.num_training_steps, self.step, wandb)
            except OSError as error:
                problem = f"cannot write into --save_dir {self.folder}: {error.strerror}"
        if self.processes.largest(len(problem)):
            raise UsageError(problem or "process 0 cannot write into --save_dir")
        return log

    def _introduce(self) -> None:
        """The first lines: what is trained, on what."""
        args, count = self.args, self.processes.count
        together = f", {count} processes" if count > 1 else ""
        self.log.line(
            f"{args.name}: {self.parameters:,} weights, {args.optimizer}, {args.dtype} on {self.device}{together}"
        )
        self.log.line(self.corpus.description)
        if self.per_layer is not None and args.grad_clipping and clip_of(args) == "last_norm":
            self.log.line(
                f"{args.optimizer} clips by the norm of the update before (clip='last_norm'), the first update not at "
                "all: full gradients are not kept until their norm is known"
            )

    def _agree_to_stop(self) -> None:
        """Every process stops after the same update, whichever of them was asked to."""
        self.stopped_by = self.processes.largest(self.stop.signal or 0)

    def _train(self) -> None:
        """Updates up to num_training_steps, with evaluations and checkpoints in between."""
        args, last = self.args, self.args.num_training_steps
        tokens_per_update = args.total_batch_size * args.max_length
        seconds, tokens = 0.0, 0
        while self.step < last and not self.stopped_by:
            start = time.perf_counter()
            rate = self.optimizer.param_groups[0]["lr"]
            loss, norm = self.update()
            seconds, tokens = seconds + time.perf_counter() - start, tokens + tokens_per_update
            values = {
                "loss": loss,
                "lr": rate,
                "grad_norm": norm,
                "tokens": self.step * tokens_per_update,
                "tokens_per_second": tokens / seconds,
                "peak_memory": peak_memory(self.device),
                "refreshes": self._log_subspaces(),
            }
            self.log.record("train", self.step, **values)
            self.log.advance(loss)
            if self.step % args.log_every == 0 or self.step == last:
                self.log.line(training_line(self.step, last, values))
                seconds, tokens = 0.0, 0
            self._agree_to_stop()
            if self.step % args.save_every == 0:
                self.save()
            if self.step % args.eval_every == 0 and self.step < last and not self.stopped_by:
                self.evaluate()

    def _log_subspaces(self) -> int:
        """A record of the subspaces that changed, if any did; returns the number of refreshes so far."""
        entries = self.subspaces.entries()
        if changed := self.subspaces.changed(entries):
            self.log.record("telemetry", self.step, parameters=changed)
        return count_refreshes(entries)

    def update(self) -> tuple[float, float]:
        """One update of all processes: mean loss over its tokens, norm of its gradient before clipping."""
        self.optimizer.zero_grad(set_to_none=True)
        try:
            loss = self._backward()
            norm = math.nan if self.per_layer is not None else self._clip()
            self.gradient_bytes = max(self.gradient_bytes, gradient_bytes(self.optimizer))
            if self.per_layer is None:
                self._check(loss, norm)
            self.optimizer.step()
            if self.per_layer is not None:
                norm = self.per_layer.grad_norm
                self._check(loss, norm)
        except RuntimeError as error:
            if type(error).__name__ != "NonFiniteGradientError":
                raise
            raise TrainingFailed(f"{error} in update {self.step + 1}; a smaller --lr may help") from None
        self.scheduler.step()
        self.step += 1
        return loss, norm

    def _backward(self) -> float:
        """The gradient of the mean loss over all processes' tokens; returns that loss."""
        args, count = self.args, self.processes.count
        tokens = args.total_batch_size * args.max_length
        total = torch.zeros((), device=self.device)
        for number, (inputs, targets) in enumerate(self._parts(), start=1):
            waits = self.ddp is not None and number < self.backwards
            with self.ddp.no_sync() if waits else nullcontext():
                loss = self.loss(inputs, targets) / tokens
                (loss * count).backward()  # the wrapper takes the mean over processes
            total += loss.detach()
        return self.processes.sum(total.item())[0]

    def _parts(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Inputs and targets of every backward pass of an update."""
        for _ in range(self.args.gradient_accumulation):
            batch = self.corpus.train.next_batch(self.args.batch_size)
            yield from zip(*(part.to(self.device).split(self.rows) for part in batch), strict=True)

    def _clip(self) -> float:
        """Bound the gradients' norm if asked to, and return what it was."""
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if self.args.grad_clipping:
            norm = torch.nn.utils.clip_grad_norm_(parameters, self.args.grad_clipping)
        else:
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        return norm.item()

    def _check(self, loss: float, norm: float) -> None:
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingFailed(
                f"the loss is {loss} and the gradient's norm {norm} in update {self.step + 1}; a smaller --lr may help"
            )

    def evaluate(self) -> float | None:
        """Mean loss over the held-out text, logged; None when asked to stop meanwhile."""
        args = self.args
        batches = held_out_batches(self.corpus.held_out, args.max_length, args.batch_size, args.eval_tokens)
        result = evaluate(self.model, batches, self.device, lambda: self.stop.asked, self.processes)
        self._agree_to_stop()
        if result is None:
            return None
        loss, count = result
        self.log.record("eval", self.step, loss=loss, perplexity=perplexity(loss), tokens=count)
        self.log.line(
            f"held out after {self.step}: loss {loss:.4f}, perplexity {perplexity(loss):.2f}, {count:,} tokens"
        )
        return loss

    def _summary(self, loss: float | None) -> None:
        """The last lines: quality, memory, plot."""
        memory = {
            "weights": weight_bytes(self.model),
            "gradients": self.gradient_bytes,
            "optimizer_state": state_bytes(self.optimizer),
            "peak_RSS": peak_resident(),
        }
        self.log.record("summary", self.step, loss=loss, first_loss=self.first_loss, **memory)
        if loss is not None:
            before = self.first_loss
            change = "" if before is None else f" (before training: {before:.4f} and {perplexity(before):.2f})"
            self.log.line(f"held-out loss {loss:.4f}, perplexity {perplexity(loss):.2f}{change}")
        parts = ", ".join(f"{name.replace('_', ' ')} {size / MIB:.1f}" for name, size in memory.items())
        earlier = f"{self.resident_before / MIB:.1f} before the model was made"
        adamw = 4 * self.parameters / MIB
        self.log.line(
            f"memory in MiB: {parts} ({earlier}); float32 AdamW has weights {adamw:.1f}, gradients {adamw:.1f}, "
            f"optimizer state {2 * adamw:.1f}"
        )
        if self.args.plot and isinstance(self.log, RunLog):
            picture = self.folder / "loss.png"
            self.log.line(plot_loss(self.log.path, picture.resolve(), f"{self.args.name}: {self.args.optimizer}"))


def training_line(step: int, last: int, values: dict[str, Any]) -> str:
    """The line printed every --log_every updates."""
    return (
        f"step {step}/{last} loss {values['loss']:.4f} lr {values['lr']:.2e} grad_norm {values['grad_norm']:.3f} "
        f"tokens {values['tokens']:,} tokens/s {values['tokens_per_second']:,.0f} "
        f"peak_memory {values['peak_memory'] / MIB:,.0f} MiB refreshes {values['refreshes']}"
    )


def perplexity(loss: float) -> float:
    """exp(loss), infinite where it has no double."""
    return math.exp(loss) if loss < 700 else math.inf


def vars_for_log(args: argparse.Namespace) -> dict[str, Any]:
    """The flags as plain values."""
    return {name: value for name, value in vars(args).items() if not name.startswith("torch_")}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run with the given arguments (default: the command line's) and return the exit code."""
    try:
        args = parse_flags(arguments)
        with Processes(args.process, args.processes) as processes, StopRequest() as stop:
            return Trainer(args, stop, processes).run()
    except UsageError as error:
        complain(" ".join(str(error).split()))
        return 2
    except TrainingFailed as error:
        complain(str(error))
        return 1
    except KeyboardInterrupt:
        return 130


def complain(sentence: str) -> None:
    """One sentence on stderr, with the process's number where it is not the first."""
    rank = os.environ.get("RANK", "0")
    print(f"run_pretrain.py{'' if rank == '0' else f' (process {rank})'}: {sentence}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
