"""One stage of training in a folder: its state on disk, its log of losses, its loop.

Every step draws its batch, sizes, dropout and noise from (seed, stage, step) alone, and a saved
state holds the weights, their average, the optimizer and the step. A run that was killed and
started again therefore ends, on a CPU, in the same bits as one that was not.
"""

import csv
import itertools
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reference import checkpoint
from reference.data import Images, draw_hues
from reference.families.parts.training import Stage, Step, Task
from reference.optimizers import Optimizers
from runtime import cli
from runtime.bundle.files import atomic_write, parsing, read_bytes
from runtime.errors import NumericalError, UsageError
from runtime.progress import Bar, log

ANEW = "Delete it to start anew"
LARGEST_LOG = 1 << 28  # bytes
LONGEST = 400  # letters of what is told of another configuration


@dataclass(frozen=True)
class Speed:
    """How steps run: where, compiled or plain, in bfloat16 or float32."""

    device: torch.device
    compile: bool
    bf16: bool
    save_every: int

    @property
    def autocast(self) -> bool:
        return self.bf16 and self.device.type == "cuda"

    @contextmanager
    def products(self) -> Iterator[None]:
        """On a CPU bf16 is the large products' alone: converting all else costs what it saves."""
        before = torch.get_float32_matmul_precision()
        if self.bf16 and not self.autocast:
            torch.set_float32_matmul_precision("medium")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


class Run:
    """The last of `stages`, trained in the folder `out`; those before it are what it stands on.

    `init`: the hash of the checkpoint that the models started from, if any.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        config: dict[str, Any],
        images: Images,
        out: Path,
        speed: Speed,
        init: str = "",
    ):
        name = stages[-1].name
        self.name, self.config, self.images, self.speed = name, config[name], images, speed
        self.seed: int = config["seed"]
        self.steps: int = self.config["steps"]
        self.state_path = out / f"{name}.state.safetensors"
        self.log_path = out / f"{name}.csv"
        # A state of another model, data set or earlier stage must not be continued with this one;
        # more or fewer steps of its own stage go on with it.
        own = {stage.name: config[stage.name] for stage in stages}
        own[name] = {key: value for key, value in own[name].items() if key != "steps"}
        own["model"] = {section: config["model"][section] for section in stages[-1].sections}
        own |= {key: config[key] for key in ("seed", "dataset", "image")}
        own |= {"labels": images.names, "images": len(images), "init": init}
        self.described = json.dumps(own, sort_keys=True)

    def train(self, task: Task) -> float:
        """Train a task's model to its averaged weights; returns the seconds, restarts included.

        Saves a state every `speed.save_every` steps and continues from the one it finds.
        """
        model, optimizer = task.model, Optimizers(task, self.config)
        average = {name: p.detach().clone() for name, p in model.state_dict().items()}
        step, seconds, rows = self._resume(model, average, optimizer)
        if step < self.steps:
            start = time.monotonic() - seconds
            loss_of = task.loss
            if self.speed.compile:
                loss_of = torch.compile(task.loss)
                task.compile_inputs()
            bar = Bar(total=self.steps, initial=step, desc=self.name, unit="step", smoothing=0.1)
            model.train()
            with cli.patient(), self.speed.products():
                while step < self.steps:
                    inputs = task.inputs(self._batch(step))
                    if self.speed.compile:
                        for index in task.token_inputs:
                            torch._dynamo.mark_dynamic(inputs[index], 1)
                    loss = self._step(model, loss_of, inputs, optimizer, step)
                    step += 1
                    decay = task.average_decay(self.config, step)
                    current = list(model.state_dict().values())
                    get_ema_multi_avg_fn(decay)(list(average.values()), current, step)
                    rows.append((step, loss))
                    bar.update()
                    if step % 20 == 0:
                        last = [value for _, value in rows[-100:]]
                        bar.set_postfix_str(f"loss={sum(last) / len(last):.4f}")
                    stop = step == self.steps or cli.signalled()
                    if stop or step % self.speed.save_every == 0:
                        seconds = time.monotonic() - start
                        self._save(model, average, optimizer, (step, seconds, rows))
                    if stop:
                        break
                if step < self.steps:
                    bar.close()
                    log.warning(
                        "%s: step %d of %d is in %s; the same command goes on from there",
                        *(self.name, step, self.steps, self.state_path),
                    )
            bar.close()
        model.load_state_dict(average)
        model.eval()
        return seconds

    def _batch(self, index: int) -> Step:
        """The images of step `index` and its random states; an epoch is a seeded permutation."""
        draw = random.Random(f"{self.seed}/{self.name}/{index}")
        torch.manual_seed(draw.getrandbits(62))
        size = self.config["batch"]
        epoch, position = divmod(index, max(len(self.images) // size, 1))
        shuffle = random.Random(f"{self.seed}/{self.name}/epoch {epoch}")
        generator = torch.Generator().manual_seed(shuffle.getrandbits(62))
        order = torch.randperm(len(self.images), generator=generator)
        chosen = order[position * size :][:size].to(self.speed.device)
        images, labels = self.images, self.images.labels[chosen]
        condition = F.one_hot(labels, len(images.names)).float()
        hues = None
        if images.painted:
            hues = draw_hues(len(chosen)).to(self.speed.device)
            digits, count = images.parts[:2]
            condition.scatter_(1, digits + hues + torch.tensor([0, count]).to(hues), 1)
        steps = (index, self.steps)
        return Step(*steps, images.pixels[chosen], condition, draw, chosen, hues)

    def _step(
        self,
        model: nn.Module,
        loss_of: Callable[..., Tensor],
        inputs: tuple[Tensor, ...],
        optimizer: Optimizers,
        index: int,
    ) -> float:
        with torch.autocast(self.speed.device.type, torch.bfloat16, enabled=self.speed.autocast):
            loss = loss_of(model, *inputs)
        if not math.isfinite(loss.item()):
            raise NumericalError(
                f"{self.name}: the loss is {loss.item()} at step {index + 1}; expected a finite "
                f"number. Lower learning_rate or clip; the last good state is {self.state_path}"
            )
        optimizer.zero_grad()
        loss.backward()
        if self.config["clip"]:
            nn.utils.clip_grad_norm_(model.parameters(), self.config["clip"])
        optimizer.step(self._rate(index))
        return float(loss.item())

    def _rate(self, index: int) -> float:
        """Linear warm-up, `learning_rate`, and a cosine to `final_rate` over the last `decay`."""
        c = self.config
        warmup = max(1, round(c["warmup"] * self.steps))
        if index < warmup:
            return float(c["learning_rate"]) * (index + 1) / warmup
        start = max(warmup, round((1 - c["decay"]) * self.steps))
        progress = max(0, index - start) / max(1, self.steps - start)
        swing = (1 + math.cos(math.pi * progress)) / 2
        return float(c["final_rate"] + (c["learning_rate"] - c["final_rate"]) * swing)

    def _save(
        self,
        model: nn.Module,
        average: dict[str, Tensor],
        optimizer: Optimizers,
        progress: tuple[int, float, list[tuple[int, float]]],
    ) -> None:
        step, seconds, rows = progress
        with atomic_write(self.log_path) as file:
            lines = (f"{number},{loss!r},{self._rate(number - 1)!r}" for number, loss in rows)
            file.write(("step,loss,learning_rate\n" + "\n".join(lines) + "\n").encode())
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.items()}
        tensors |= {f"optimizer.{name}": value for name, value in optimizer.state().items()}
        metadata = {
            "step": str(step),
            "seconds": f"{seconds:.1f}",
            "described": self.described,
        }
        contiguous = {name: value.contiguous().clone() for name, value in tensors.items()}
        with atomic_write(self.state_path) as file:
            file.write(save_safetensors(contiguous, metadata))

    def _resume(
        self, model: nn.Module, average: dict[str, Tensor], optimizer: Optimizers
    ) -> tuple[int, float, list[tuple[int, float]]]:
        """Continue from the saved state, where there is one: (step, seconds, log rows)."""
        if not self.state_path.exists():
            return 0, 0.0, []
        data = read_bytes(self.state_path, "a training state", ANEW)
        tensors, metadata = checkpoint.parse(data, self.state_path)
        if (found := metadata.get("described", "{}")) != self.described:
            with parsing(self.state_path, "training state", ANEW):
                changed = "; ".join(differences(json.loads(found), json.loads(self.described)))
            raise UsageError(
                f"{self.state_path}: belongs to another configuration or data set: "
                f"{shorten(changed, LONGEST, placeholder=' …')}. Give another --out, or delete the "
                "file to start anew"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            chosen = {k: v for k, v in tensors.items() if k.startswith(prefix)}
            return {k.removeprefix(prefix): v.to(self.speed.device) for k, v in chosen.items()}

        checkpoint.load_tensors(model, part("model."), self.state_path)
        checkpoint.check_tensors(model, part("average."), self.state_path)
        average.update({name: value.float() for name, value in part("average.").items()})
        with parsing(self.state_path, "training state", ANEW):
            optimizer.load(part("optimizer."))
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if not 0 <= step <= self.steps or not 0 <= seconds < math.inf:
                raise ValueError(f"step {step} after {seconds} seconds")
        anew = f"Delete {self.state_path} to start anew"
        with parsing(self.log_path, "log of losses", anew):
            text = read_bytes(self.log_path, "a log of losses", anew, LARGEST_LOG).decode()
            rows = itertools.islice(csv.DictReader(text.splitlines()), step)
            logged = [(int(r["step"]), float(r["loss"])) for r in rows]
            if [number for number, _ in logged] != [*range(1, step + 1)]:
                raise ValueError(f"it does not have the steps from 1 to {step}")
        return step, seconds, logged


def differences(found: Any, wanted: Any, name: str = "") -> list[str]:
    """What two nested mappings differ in, as in `model.r2id.width was 96, is 128`."""
    if not (isinstance(found, dict) and isinstance(wanted, dict)):
        return [] if found == wanted else [f"{name} was {found!r}, is {wanted!r}"]
    return [
        line
        for key in sorted(found.keys() | wanted.keys())
        for line in differences(found.get(key), wanted.get(key), f"{name}.{key}".lstrip("."))
    ]


def draw_losses(out: Path, runs: list[Run]) -> None:
    """One picture of every stage's loss over its steps, smoothed over a hundredth of them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4), layout="constrained")
    for axes, run in zip(figure.subplots(1, len(runs), squeeze=False)[0], runs, strict=True):
        with run.log_path.open() as file:
            rows = [(int(r["step"]), float(r["loss"])) for r in csv.DictReader(file)]
        width = max(1, len(rows) // 100)
        smooth = [
            sum(loss for _, loss in rows[i : i + width]) / len(rows[i : i + width])
            for i in range(0, len(rows), width)
        ]
        axes.plot([step for step, _ in rows[::width]], smooth)
        axes.set(title=run.name, xlabel="step", ylabel="loss (MSE)", yscale="log")
        axes.grid(alpha=0.3, which="both")
    with atomic_write(out / "loss.png") as png:
        figure.savefig(png, format="png", dpi=120)
