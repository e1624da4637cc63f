"""Fold guidance into R2ID's weights: python -m reference.distill --data DIR --out FOLDER.

The copy learns eps as guidance makes it of the teacher's, so that a step needs one branch and no
null condition: half the products of the blocks that see conditions. Sizes, noise and what an error
counts are those of the teacher's own training. Source: Meng et al., "On Distillation of Guided
Diffusion Models" (arXiv 2210.03142), section 3.1, with one scale instead of a range of them.

Writes `checkpoint.safetensors`, whose bundle draws at guidance 1 where a request names none, and
`distilled.png`: rows of the teacher's and under each the copy's pictures of the same seeds. A run
can be stopped and started again as `reference.train`'s can.
"""

import argparse
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import Tensor

from reference import checkpoint
from reference.checkpoint import SHIPPED, Checkpoint
from reference.data import Images
from reference.evaluation.digits import asked
from reference.evaluation.drawing import Sampling, TorchDrawing
from reference.evaluation.measures import psnr
from reference.families import FAMILIES, R2
from reference.families.parts.training import Stage, Step
from reference.families.r2.model import R2Models
from reference.families.r2.training import R2IDModels, R2IDTask
from reference.run import Run, Speed, draw_losses
from reference.train import device_of, hardware, load_images
from runtime import cli
from runtime.bundle.folders import owning
from runtime.errors import UsageError
from runtime.images.pixels import contact_sheet, save_png, to_uint8
from runtime.sampling.choices import WHOLE
from runtime.sampling.schedule import COSINE, log_snr

NAME = "distilled"
HIDDEN = 0.1  # share of conditions that are hidden: what is drawn without a label
COLUMNS, ROWS = 10, 2  # of the picture


class GuidedTask(R2IDTask):
    """Weighted MSE of eps against eps_null + g · (eps - eps_null) of a teacher.

    g is the section's `guidance` where t is within its `guidance_interval`, outside it 1.
    """

    def __init__(self, config: dict[str, Any], models: R2Models, images: Images, teacher: R2Models):
        super().__init__(config, models, images)
        self.teacher = R2IDModels(teacher)
        self.predict = teacher.r2id.predict_tokens

    def compile_inputs(self) -> None:
        super().compile_inputs()
        self.predict = torch.compile(self.predict, dynamic=True)

    def inputs(self, step: Step) -> tuple[Tensor, ...]:
        """As of R2ID's own training, with the teacher's guided eps in the place of the noise."""
        noisy, at, alpha_bar, label, _, weight = super().inputs(step)
        with torch.no_grad():
            text = self.teacher.condition(torch.cat([torch.zeros_like(label), label]))
            null, eps = self.predict(noisy, at, alpha_bar, text)
        scale = self.scale(alpha_bar).view(-1, 1, 1)
        return noisy, at, alpha_bar, label, null + scale * (eps - null), weight

    def scale(self, alpha_bar: Tensor) -> Tensor:
        """g at alpha_bar `[B]`."""
        low, high = self.config["guidance_interval"]
        t = torch.from_numpy(COSINE.time(log_snr(alpha_bar.double().cpu().numpy())))
        inside = ((t >= low) & (t <= high)).to(alpha_bar.device)
        return torch.where(inside, self.config["guidance"], 1.0).float()


def section(teacher: Checkpoint, args: argparse.Namespace) -> dict[str, Any]:
    """The stage's configuration: R2ID's own of the teacher's provenance, with a rate that falls."""
    own = teacher.provenance.get("config", {}).get("r2id")
    if teacher.family is not FAMILIES[R2] or own is None:
        raise UsageError(
            f"{args.checkpoint}: of the family {teacher.family.name}, its training "
            f"{'' if own else 'not '}known; expected an R2 checkpoint of reference.train"
        )
    rates = {"learning_rate": args.learning_rate, "warmup": 0.02, "decay": 1.0, "ema": 0.999}
    given = {"steps": args.steps, "guidance": args.guidance, "condition_dropout": HIDDEN}
    return own | rates | given | {"guidance_interval": [*args.guidance_interval]}


def distil(args: argparse.Namespace) -> None:
    """Train the copy in the folder `args.out`, then compare it with its teacher."""
    device = device_of(args.device)
    teacher, student = (checkpoint.load(args.checkpoint) for _ in range(2))
    own = section(teacher, args)
    config = teacher.provenance["config"] | {NAME: own}
    images = load_images(config, teacher.models, args.data).to(device)
    models = student.models
    models.config = msgspec.structs.replace(models.config, guidance_scale=1.0)
    for part in (teacher.models.to(device), models.to(device)):
        part.r2ir.requires_grad_(False)
    R2IDModels(models).requires_grad_(True)
    speed = Speed(device, args.compile, args.bf16, args.save_every)
    stage = Stage(NAME, GuidedTask, frozenset(), ("r2ir", "r2id"))
    with owning(args.out):
        run = Run([stage], config, images, args.out, speed, init=teacher.sha256)
        seconds = run.train(GuidedTask(own, models, images, teacher.models))
        provenance = teacher.provenance | {
            "config": config,
            "teacher": teacher.sha256,
            "seconds": {NAME: round(seconds)},
            "hardware": hardware(device),
            "torch": torch.__version__,
        }
        path = args.out / "checkpoint.safetensors"
        checkpoint.save(path, models, provenance, getattr(torch, args.dtype))
        draw_losses(args.out, [run])
        compare(args.out, teacher.models, models, own, images.parts)
    print(f"checkpoint: {path}")


def compare(
    out: Path,
    teacher: R2Models,
    student: R2Models,
    own: dict[str, Any],
    parts: tuple[int, ...],
) -> None:
    """Draw and measure the copy beside its teacher, of the same seeds, at the default latent."""
    count, size = ROWS * COLUMNS, teacher.config.default_latent
    labels = asked(count, parts) if len(parts) > 1 else torch.arange(count) % parts[0]
    guided = Sampling(guidance_scale=own["guidance"], guidance_interval=own["guidance_interval"])
    alone = Sampling(guidance_scale=1.0)
    wanted, found = (
        TorchDrawing(models, sampling, parts)(labels, size).images
        for models, sampling in ((teacher, guided), (student, alone))
    )
    rows = [own[i : i + COLUMNS] for i in range(0, count, COLUMNS) for own in (wanted, found)]
    save_png(out / "distilled.png", contact_sheet(to_uint8(torch.cat(rows).numpy()), COLUMNS), {})
    each = [psnr(a, b) for a, b in zip(found, wanted, strict=True)]
    print(f"PSNR of the same seeds: {sum(each) / count:.1f} dB, the worst {min(each):.1f}")


def main() -> None:
    """The command line."""
    parser = cli.parser("reference.distill", __doc__)
    add, optional = parser.add_argument, argparse.BooleanOptionalAction
    on_gpu = torch.cuda.is_available()
    add("--checkpoint", type=Path, default=SHIPPED, help="the teacher")
    add("--data", type=Path, required=True, help="what the teacher was trained on")
    add("--out", type=Path, required=True, help="folder of state, checkpoint and pictures")
    add("--guidance", type=cli.number(-100, 100), default=2.0, help="scale that is folded in (2)")
    interval = "t within which it counts, else it is 1 (0..1)"
    add("--guidance-interval", type=cli.interval, default=WHOLE, metavar="LOW..HIGH", help=interval)
    add("--steps", type=cli.number(1, 10_000_000, int), default=3000, help="of training (3000)")
    rate = "the first, which falls to the teacher's last (1e-3)"
    add("--learning-rate", type=cli.number(0, 1), default=1e-3, help=rate)
    add("--device", default="cuda" if on_gpu else "cpu", help="what PyTorch trains on")
    add("--compile", action=optional, default=on_gpu, help="torch.compile (on CUDA)")
    bf16 = "bfloat16 autocast; on a CPU large products alone (on CUDA)"
    add("--bf16", action=optional, default=on_gpu, help=bf16)
    of = "of the checkpoint's tensors (float16)"
    add("--dtype", choices=("float16", "float32"), default="float16", help=of)
    every = cli.number(1, 1_000_000, int)
    add("--save-every", type=every, default=500, metavar="STEPS", help="steps between states (500)")
    cli.run(distil, parser)


if __name__ == "__main__":
    main()
