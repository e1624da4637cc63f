"""Train a family's models, stage by stage: python -m reference.train --config mnist --data DIR.

Every step draws its batch, sizes, dropout and noise from (seed, stage, step) alone, and a saved
state holds the weights, their average, the optimizer and the step. A run that was killed and
started again therefore ends, on a CPU, in the same bits as one that was not.
"""

import argparse
import csv
import json
import math
import platform
import random
import time
import tomllib
from collections.abc import Callable, Iterator, Set
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save as save_safetensors
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from reference import checkpoint
from reference.data import Images, draw_hues, load_folder, load_mnist, load_painted_mnist
from reference.families import FAMILIES, R2, Family
from reference.families.parts.models import Models
from reference.families.parts.training import WEIGHTS, Stage, Step, Task
from reference.optimizers import KINDS as OPTIMIZERS
from reference.optimizers import Optimizers
from runtime import cli
from runtime.bundle.files import atomic_write, parsing, read_bytes, sha256
from runtime.bundle.folders import owning
from runtime.errors import NumericalError, UsageError
from runtime.progress import Bar, log

CONFIGS = Path(__file__).parent / "configs"
ANEW = "Delete it to start anew"
LARGEST_LOG = 1 << 30  # bytes
DATASETS = ("mnist", "painted-mnist", "folder")
KEYS = frozenset(
    {"steps", "batch", "optimizer", "learning_rate", "final_rate", "warmup", "decay"}
    | {"weight_decay", "clip", "ema"}
)


def family_in(config: dict[str, Any], name: str) -> Family:
    """The family of a configuration, R2 where it names none; raises UsageError."""
    family = FAMILIES.get(config.get("family", R2))
    if family is None:
        raise UsageError(
            f"--config {name}: family is {config['family']!r}; expected one of {sorted(FAMILIES)}"
        )
    return family


def read_config(name: str) -> dict[str, Any]:
    """A named configuration of `reference/configs`, or a TOML file; raises UsageError."""
    path = Path(name) if name.endswith(".toml") else CONFIGS / f"{name}.toml"
    try:
        config = tomllib.loads(path.read_text())
    except FileNotFoundError:
        names = sorted(p.stem for p in CONFIGS.glob("*.toml"))
        raise UsageError(f"--config {name}: no such file; expected one of {names}") from None
    except ValueError as error:
        raise UsageError(f"--config {name}: not TOML ({error})") from None
    stages = family_in(config, name).training.STAGES
    own = {"family"} & config.keys() | {stage.name for stage in stages}
    check_keys(name, config, {"dataset", "seed", "image", "model"} | own)
    for stage in stages:
        check_keys(f"{name} [{stage.name}]", config[stage.name], KEYS | stage.keys)
        check_choice(
            f"{name} [{stage.name}] optimizer", config[stage.name]["optimizer"], OPTIMIZERS
        )
        weight = config[stage.name].get("loss_weight", WEIGHTS)[0]
        check_choice(f"{name} [{stage.name}] loss_weight", weight, WEIGHTS)
    check_choice(f"{name}: dataset", config["dataset"], DATASETS)
    return config


def check_choice(what: str, found: Any, expected: tuple[str, ...]) -> None:
    """Raise UsageError where a configuration's value is none of those that there are."""
    if found not in expected:
        raise UsageError(f"--config {what} is {found!r}; expected one of {expected}")


def check_keys(name: str, section: dict[str, Any], expected: Set[str]) -> None:
    """Raise UsageError where a configuration's section has not exactly the expected keys."""
    missing, surplus = sorted(expected - section.keys()), sorted(section.keys() - expected)
    if missing or surplus:
        raise UsageError(
            f"--config {name}: lacks {missing} and has unknown {surplus}; "
            "compare with reference/configs"
        )


def build_models(config: dict[str, Any], source: str) -> Any:
    """Fresh models of the family with the configuration's dropouts, initialised from its seed."""
    torch.manual_seed(config["seed"])
    return family_in(config, source).training.build(config, source)


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
    """One stage of training in a folder: its state on disk, its log, its loop."""

    def __init__(
        self,
        stage: Stage,
        config: dict[str, Any],
        images: Images,
        out: Path,
        speed: Speed,
        init: str = "",
    ):
        name = stage.name
        self.name, self.config, self.images, self.speed = name, config[name], images, speed
        self.seed: int = config["seed"]
        self.steps: int = self.config["steps"]
        self.state_path = out / f"{name}.state.safetensors"
        self.log_path = out / f"{name}.csv"
        # A state of another model, data set or earlier stage must not be continued with this one;
        # more or fewer steps of its own stage go on with it.
        names = [own.name for own in family_in(config, name).training.STAGES]
        stages = {own: config[own] for own in names[: names.index(name) + 1]}
        stages[name] = {key: value for key, value in stages[name].items() if key != "steps"}
        models = {section: config["model"][section] for section in stage.sections}
        common = [config["seed"], config["dataset"], config["image"], images.names, len(images)]
        common += [init] if init else []
        described = json.dumps([stages, models, common], sort_keys=True)
        self.fingerprint = sha256(described.encode())

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
            "fingerprint": self.fingerprint,
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
        if metadata.get("fingerprint") != self.fingerprint:
            raise UsageError(
                f"{self.state_path}: belongs to another configuration or data set. "
                "Give another --out, or delete the file to start anew"
            )

        def part(prefix: str) -> dict[str, Tensor]:
            chosen = {k: v for k, v in tensors.items() if k.startswith(prefix)}
            return {k.removeprefix(prefix): v.to(self.speed.device) for k, v in chosen.items()}

        checkpoint.load_tensors(model, part("model."), self.state_path)
        with parsing(self.state_path, "training state", ANEW):
            average.update(self._averages(part("average."), average))
            optimizer.load(part("optimizer."))
            step, seconds = int(metadata["step"]), float(metadata["seconds"])
            if not 0 <= step <= self.steps or not 0 <= seconds < math.inf:
                raise ValueError(f"step {step} after {seconds} seconds")
        with parsing(self.log_path, "log of losses", ANEW):
            text = read_bytes(self.log_path, "a log of losses", ANEW, LARGEST_LOG).decode()
            rows = csv.DictReader(text.splitlines())
            logged = [(int(r["step"]), float(r["loss"])) for r in rows]
        return step, seconds, logged[:step]

    def _averages(self, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
        """The averages of a state; raises ValueError where they are not those of the model."""
        shapes = {name: tensor.shape for name, tensor in found.items()}
        if shapes != {name: tensor.shape for name, tensor in wanted.items()}:
            raise ValueError("its averages are not those of the model")
        return found


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


def hardware(device: torch.device) -> str:
    """What the training ran on, for the checkpoint's provenance."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{torch.get_num_threads()} CPU threads ({platform.machine()})"


def train(args: argparse.Namespace) -> None:
    """Every stage, then `checkpoint.safetensors` in the folder `args.out`."""
    config, device = read_config(args.config), device_of(args.device)
    with owning(args.out):
        train_in(args.out, args, config, device)


def train_in(
    out: Path, args: argparse.Namespace, config: dict[str, Any], device: torch.device
) -> None:
    """`train` in a folder that nobody else writes to."""
    name = args.config
    on_gpu = device.type == "cuda"
    speed = Speed(
        device,
        compile=on_gpu if args.compile is None else args.compile,
        bf16=on_gpu if args.bf16 is None else args.bf16,
        save_every=args.save_every,
    )
    family = family_in(config, name)
    models = build_models(config, f"--config {name}")
    images = load_images(config, models, args.data).to(device)
    init = ""
    if args.init is not None:
        init = take_over(models, family, args.init)
    models = models.to(device)
    runs, seconds = [], {}
    for stage in family.training.STAGES:
        runs.append(Run(stage, config, images, out, speed, init))
        seconds[stage.name] = runs[-1].train(stage.task(config[stage.name], models, images))
    provenance = {
        "command": f"python -m reference.train --config {Path(name).name}"
        + " --compile" * (speed.compile and not on_gpu)
        + " --bf16" * (speed.bf16 and not on_gpu)
        + f" --dtype {args.dtype}",
        **({"init": init} if init else {}),
        "seconds": {stage: round(value) for stage, value in seconds.items()},
        "hardware": hardware(device),
        "torch": torch.__version__,
        "config": config,
        "labels": list(images.names),
        "parts": list(images.parts),
    }
    path = out / "checkpoint.safetensors"
    checkpoint.save(path, models, provenance, getattr(torch, args.dtype))
    draw_losses(out, [run for run in runs if run.steps])
    print(f"checkpoint: {path}")


def device_of(name: str) -> torch.device:
    """A device that tensors can be put on; raises UsageError for another."""
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).cpu()
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"--device {name}: cannot be used here ({reason}); expected cpu, or cuda with a GPU "
            "and a PyTorch that is built for it"
        ) from None
    return device


def take_over(models: Models, family: Family, path: Path) -> str:
    """Start `models` from a checkpoint's weights; returns its hash. Raises UsageError."""
    first = checkpoint.load(path)
    if first.family is not family:
        raise UsageError(
            f"--init {path}: of the family {first.family.name}; expected {family.name}"
        )
    fresh = family.training.start_from(models, first.models)
    print(f"{path}: taken over" + (f" but for {', '.join(fresh)}" if fresh else ""))
    return first.sha256


def load_images(config: dict[str, Any], models: Models, folder: Path) -> Images:
    """The configuration's data set out of `folder`."""
    if config["dataset"] == "mnist":
        return load_mnist(folder).cropped(config["image"])
    if config["dataset"] == "painted-mnist":
        return load_painted_mnist(folder).cropped(config["image"])
    images = load_folder(folder, models.config.channels, config["image"], models.config.labels)
    say_labels(folder, images, models.config.labels)
    return images


def say_labels(folder: Path, images: Images, labels: int) -> None:
    """Say what a folder leaves of a configuration's labels without an image."""
    counts = torch.bincount(images.labels, minlength=len(images.names)).tolist()
    empty = [name for name, count in zip(images.names, counts, strict=True) if not count]
    if labels > 1 and not any(path.is_dir() for path in folder.iterdir()):
        log.warning("%s: has no sub-folders, so that every image has the one label image", folder)
    if len(images.names) < labels or empty:
        log.warning(
            "%s: fills %d of %d labels%s; the others draw nothing in particular. Set labels in "
            "[model.condition], or add folders",
            *(folder, len(images.names) - len(empty), labels),
            f" (no image in {', '.join(empty)})" if empty else "",
        )


def main() -> None:
    """The command line."""
    parser = cli.parser("reference.train", __doc__)
    optional = argparse.BooleanOptionalAction
    parser.add_argument("--config", default="mnist", help="a name in reference/configs, or a .toml")
    parser.add_argument("--data", type=Path, required=True, help="folder of MNIST IDX or images")
    parser.add_argument("--out", type=Path, required=True, help="folder of states and checkpoint")
    parser.add_argument("--init", type=Path, help="checkpoint whose weights to start from")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="what PyTorch trains on")
    parser.add_argument("--compile", action=optional, help="torch.compile (default: on CUDA)")
    bf16 = "bfloat16 autocast; on a CPU large products alone (default: on CUDA)"
    parser.add_argument("--bf16", action=optional, help=bf16)
    of = "of the checkpoint's tensors; float16 halves it"
    parser.add_argument("--dtype", choices=("float16", "float32"), default="float32", help=of)
    kept = "steps between saved states, from which training goes on"
    every = cli.number(1, 1_000_000, int)
    parser.add_argument("--save-every", type=every, default=500, metavar="STEPS", help=kept)
    cli.run(train, parser)


if __name__ == "__main__":
    main()
