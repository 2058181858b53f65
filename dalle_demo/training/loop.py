"""stage -> trained stage: the one training loop, resumable to the bit and data-parallel over processes.

Nothing in it is random: a stage makes the samples of a step from (seed, sample number) alone. So a run that is
killed goes on at its last checkpoint exactly as an unbroken one, and w processes see the data that one would see.
"""

import copy
import json
import math
import os
import signal
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dalle_demo.hardware import give_back_memory, has_native_bf16
from dalle_demo.training.muon import Muon

WEIGHT_DECAY = 0.05
CLIP_NORM = 1.0
LOG_EVERY = 20  # steps


class Stage(Protocol):
    """What a stage brings to the loop; `network` maps a batch to named losses, of which `loss` is minimised."""

    network: nn.Module
    made_from: dict[str, str]  # fingerprints of data, sizes and seed, which a resumed run must share

    def batch(self, samples: range) -> dict[str, Tensor]:
        """Tensors of the given sample numbers."""

    def validate(self, network: nn.Module) -> dict[str, float]:
        """Figures on held-out data."""

    def export(self, network: nn.Module, folder: Path) -> None:
        """Write weights and config."""


@dataclass(frozen=True)
class Plan:
    """How long and how fast to train. Give `steps` for a run that can be repeated, or `minutes` for a deadline."""

    batch: int
    learning_rate: float
    steps: int | None = None
    minutes: float | None = None
    warmup: int = 100
    checkpoint_minutes: float = 4.0
    checkpoint_steps: int | None = None  # also at each multiple of this, 0 included
    log_steps: int | None = None  # between lines of the log; LOG_EVERY when None
    betas: tuple[float, float] = (0.9, 0.95)
    precision: str = "auto"  # "fp32", "bf16", or bf16 where the processor multiplies it natively

    def __post_init__(self):
        if (self.steps is None) == (self.minutes is None):
            raise ValueError("give either --steps or --minutes")
        for name in ("batch", "learning_rate", "steps", "minutes"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} must be more than 0, not {value}")


class Monitor:
    """What a run tells others and hears from them, in its first process; this one is silent and deaf."""

    def stepped(self, run: "Run") -> bool:
        """After each step: whether a checkpoint is wanted now. May set `run.stopping`."""
        return False

    def checking(self, run: "Run") -> None:
        """At each checkpoint, once the averaged weights are validated and before it is written."""


def train(
    make_stage: Callable[["Workers"], Stage],
    plan: Plan,
    out: Path,
    resume: bool = False,
    monitor: Monitor | None = None,
) -> None:
    """Train until the plan ends or a signal asks to stop; `out` then holds checkpoint.pt, log.jsonl and weights/.

    Raises ValueError when `out` already holds a run and `resume` is false, or the batch does not divide.
    """
    if not resume and (out / "checkpoint.pt").exists():
        raise ValueError(f"{out} already holds a run; add --resume to go on with it, or choose another --out")
    out.mkdir(parents=True, exist_ok=True)
    with Workers() as workers:
        if plan.batch % workers.count:
            raise ValueError(f"--batch {plan.batch} cannot be divided among {workers.count} processes")
        resuming = (out / "checkpoint.pt").exists()
        run = Run(make_stage(workers), plan, out, workers, monitor or Monitor())
        if resuming:
            run.restore()
        elif workers.rank == 0:  # of a run that was killed before its first checkpoint
            (out / "log.jsonl").unlink(missing_ok=True)
        run.go()


class Workers:
    """The processes of one run: alone, or started by torchrun, which sets WORLD_SIZE."""

    def __enter__(self) -> "Workers":
        self.count = int(os.environ.get("WORLD_SIZE", "1"))
        if self.count > 1:
            dist.init_process_group("gloo")
            torch.set_num_threads(1)
        self.rank = dist.get_rank() if self.count > 1 else 0
        return self

    def __exit__(self, *_) -> None:
        if self.count > 1:
            dist.destroy_process_group()

    def agree(self, *values: float) -> list[float]:
        """Maximum over processes of each value."""
        if self.count == 1:
            return list(values)
        shared = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return shared.tolist()

    def wait(self) -> None:
        """Return when all processes have come here."""
        if self.count > 1:
            dist.barrier()


class Run:
    """State of one run: what a checkpoint holds, and the steps that change it. Frozen weights are no part of either."""

    def __init__(self, stage: Stage, plan: Plan, out: Path, workers: Workers, monitor: Monitor):
        self.stage, self.plan, self.out, self.workers, self.monitor = stage, plan, out, workers, monitor
        network = stage.network
        self.frozen = {name: p for name, p in network.named_parameters() if not p.requires_grad}
        self.ema = copy.deepcopy(network, {id(p): p for p in self.frozen.values()}).requires_grad_(False)
        self.wrapped = DistributedDataParallel(network) if workers.count > 1 else network
        self.optimizers = make_optimizers(network, plan.learning_rate, plan.betas)
        self.step, self.seconds, self.saved_step = 0, 0.0, None
        self.autocast = plan.precision == "bf16" or (plan.precision == "auto" and has_native_bf16())
        self.stopping = False

    def go(self) -> None:
        """Step until the end, logging and saving on the way."""
        previous = {s: signal.signal(s, self._ask_to_stop) for s in (signal.SIGINT, signal.SIGTERM)}
        saved = started = time.monotonic()
        base, first = self.seconds, self.step
        bar = tqdm(total=100, initial=round(100 * self.progress(), 2), unit="%", disable=self.workers.rank > 0)
        try:
            if self.saved_step is None and self.plan.checkpoint_steps:
                self.save()
            while not self._finished():
                losses = self.take_step()
                self.seconds = base + time.monotonic() - started
                rate = (self.step - first) * self.plan.batch / (time.monotonic() - started)
                wanted = self.workers.rank == 0 and self.monitor.stepped(self)
                late = time.monotonic() - saved >= 60 * self.plan.checkpoint_minutes or self._planned()
                due, broken = self.workers.agree(wanted or late, not math.isfinite(losses["loss"]))
                if broken:  # before anything of it reaches the last good checkpoint
                    raise ValueError(f"the loss is no longer finite at step {self.step}; lower --learning-rate")
                self._report(bar, losses, rate)
                if self.step % LOG_EVERY == 0:
                    give_back_memory()
                if due:
                    self.save()
                    saved = time.monotonic()
            if self.saved_step != self.step:
                self.save()
        finally:
            bar.close()
            for number, handler in previous.items():
                signal.signal(number, handler)

    def progress(self) -> float:
        """Share of the plan that is done, 0..1."""
        if self.plan.steps is not None:
            return min(1.0, self.step / self.plan.steps)
        return min(1.0, self.seconds / (60 * self.plan.minutes))

    def _planned(self) -> bool:
        return self.plan.checkpoint_steps is not None and self.step % self.plan.checkpoint_steps == 0

    def _finished(self) -> bool:
        stopping, done = self.workers.agree(self.stopping, self.progress() if self.workers.rank == 0 else 0.0)
        self.done = done  # one value for all processes, since their clocks differ
        return bool(stopping) or done >= 1

    def _ask_to_stop(self, *_) -> None:
        self.stopping = True

    def take_step(self) -> dict[str, Tensor]:
        """One optimiser step on this process's share of the batch; returns the detached losses."""
        rate = self.plan.learning_rate * schedule(self.step, self.plan.warmup, self.done)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        share = self.plan.batch // self.workers.count
        start = self.step * self.plan.batch + self.workers.rank * share
        batch = self.stage.batch(range(start, start + share))
        # In bf16 the processor's fused attention goes backward three times slower than its plain parts; checkpointed
        # layers are computed again on the way back, and must be so in the same way
        with sdpa_kernel(SDPBackend.MATH) if self.autocast else nullcontext():
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                losses = self.wrapped(**batch)
            self.stage.network.zero_grad(set_to_none=True)
            losses["loss"].backward()
        nn.utils.clip_grad_norm_(self.stage.network.parameters(), CLIP_NORM)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):  # Muon's products
            for optimizer in self.optimizers:
                optimizer.step()
        self.step += 1
        update_ema(self.ema, self.stage.network, self.step)
        return {name: value.detach() for name, value in losses.items()}

    def _report(self, bar: tqdm, losses: Mapping[str, Tensor], rate: float) -> None:
        if self.workers.rank > 0 or self.step % (self.plan.log_steps or LOG_EVERY):
            return
        figures = {name: round(value.item(), 5) for name, value in losses.items()}
        bar.update(round(100 * self.progress() - bar.n, 2))
        bar.set_postfix(step=self.step, loss=figures["loss"], images_per_s=round(rate, 1))
        lr = self.optimizers[0].param_groups[0]["lr"]
        self._log({**figures, "learning_rate": lr, "images_per_second": round(rate, 1)})

    def _log(self, figures: Mapping[str, float]) -> None:
        line = {"step": self.step, "seconds": round(self.seconds, 1), **figures}
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")

    def save(self) -> None:
        """Validate the averaged weights, export them and write the checkpoint, each under its final name only."""
        if self.workers.rank == 0:
            self.ema.eval()
            with torch.no_grad():
                self._log(self.stage.validate(self.ema))
            self.stage.export(self.ema, self.out / "weights")
            self.monitor.checking(self)
            state = {
                "made_from": self.stage.made_from,
                "step": self.step,
                "batch": self.plan.batch,
                "seconds": self.seconds,
                "network": self._trained(self.stage.network),
                "ema": self._trained(self.ema),
                "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            }
            partial = self.out / "checkpoint.pt.part"
            torch.save(state, partial)
            partial.replace(self.out / "checkpoint.pt")
        self.saved_step = self.step
        self.workers.wait()

    def _trained(self, network: nn.Module) -> dict[str, Tensor]:
        return {name: value for name, value in network.state_dict().items() if name not in self.frozen}

    def restore(self) -> None:
        """Go back to the last checkpoint; log lines written after it are dropped.

        Raises ValueError when the run was made from other data, sizes, batch or seed than it is to go on with, or by a
        version that trained other weights.
        """
        state = torch.load(self.out / "checkpoint.pt", weights_only=True)
        foreign = f"{self.out} was made by another version and cannot go on; choose another --out"
        if state["made_from"].keys() != self.stage.made_from.keys():
            raise ValueError(foreign)
        check_same(self.out, state["made_from"], self.stage.made_from)
        batch = {"--batch": self.plan.batch}  # of which samples are counted
        check_same(self.out, {"--batch": state.get("batch", self.plan.batch)}, batch)
        holds = state["network"].keys(), len(state.get("optimizers", ()))
        if holds != (self._trained(self.stage.network).keys(), len(self.optimizers)):
            raise ValueError(foreign)
        self.stage.network.load_state_dict(self.frozen | state["network"])
        self.ema.load_state_dict(self.frozen | state["ema"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.step, self.seconds, self.saved_step = state["step"], state["seconds"], state["step"]
        log = self.out / "log.jsonl"
        if self.workers.rank == 0 and log.exists():
            lines = [line for line in log.read_text().splitlines(True) if _step_of(line) <= self.step]
            partial = log.with_name("log.jsonl.part")
            partial.write_text("".join(lines))
            partial.replace(log)
        self.workers.wait()


def check_same(out: Path, before: Mapping[str, object], now: Mapping[str, object]) -> None:
    """Raise ValueError that names the first thing in which a run's origin differs from what it was."""
    changed = [name for name in now if before.get(name) != now[name]]
    if changed:
        raise ValueError(f"{out} was made with another {changed[0]}; give the same one, or choose another --out")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # cut short by the kill
        return math.inf


def schedule(step: int, warmup: int, done: float) -> float:
    """Linear warm-up, then half a cosine over the share of the plan that is done (Loshchilov & Hutter 2017)."""
    return min(1.0, (step + 1) / warmup) * 0.5 * (1 + math.cos(math.pi * done))


def make_optimizers(
    network: nn.Module, learning_rate: float, betas: tuple[float, float]
) -> list[torch.optim.Optimizer]:
    """AdamW, and Muon for the matrices of Transformer layers, if any.

    Only matrices and kernels decay, never biases and norms. The factors of adapters, not named `weight`, are AdamW's.
    """
    named = [(name, p) for name, p in network.named_parameters() if p.requires_grad]
    inner = [p for name, p in named if _is_for_muon(name, p)]
    outer = [p for name, p in named if not _is_for_muon(name, p)]
    groups = [
        {"params": [p for p in outer if p.ndim >= 2], "weight_decay": WEIGHT_DECAY},
        {"params": [p for p in outer if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizers = [torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)]
    return [*optimizers, Muon(inner, learning_rate, weight_decay=WEIGHT_DECAY)] if inner else optimizers


def _is_for_muon(name: str, p: Tensor) -> bool:
    return ".layers." in name and name.endswith(".weight") and p.ndim == 2


def update_ema(ema: nn.Module, network: nn.Module, step: int, gamma: float = 16.97) -> None:
    """Power-function average, whose horizon grows with the run (Karras et al. 2024, equation 127; about 5 %)."""
    beta = (1 - 1 / step) ** (gamma + 1)
    pairs = zip(ema.parameters(), network.parameters(), strict=True)
    averages, values = zip(*[(average, value) for average, value in pairs if average is not value], strict=True)
    torch._foreach_lerp_(averages, values, 1 - beta)
