"""Train a family's models, stage by stage: python -m reference.train --config mnist --data DIR.

A run can be stopped and started again at any time, and ends in the same bits; see `reference.run`.
"""

import argparse
import platform
import tomllib
from collections.abc import Set
from pathlib import Path
from typing import Any

import torch

from reference import checkpoint
from reference.data import Images, load_folder, load_mnist, load_painted_mnist
from reference.families import FAMILIES, R2, Family
from reference.families.parts.models import Models
from reference.families.parts.training import WEIGHTS
from reference.optimizers import KINDS as OPTIMIZERS
from reference.run import Run, Speed, draw_losses
from runtime import cli
from runtime.bundle.folders import owning
from runtime.errors import UsageError
from runtime.progress import log

CONFIGS = Path(__file__).parent / "configs"
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
    stages = family.training.STAGES
    for number, stage in enumerate(stages, 1):
        runs.append(Run(stages[:number], config, images, out, speed, init))
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
