"""Draw images from a bundle: python -m runtime.generate --label 7 --image 256x256."""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.bundle.files import check_writable
from runtime.edited import read_pictures, resolve_edit
from runtime.errors import ArtefactError, UsageError
from runtime.outputs import output_paths
from runtime.recipe import MOST_IMAGES, label_to_json, made_in, repeated
from runtime.render import Drawing
from runtime.sampling.choices import SOLVER, SOLVERS, SPACINGS, WHOLE

if TYPE_CHECKING:
    from runtime.images.png import Rows
    from runtime.pipeline.bundle import Bundle
    from runtime.pipeline.diffuser import Progress
    from runtime.sampling.labels import Label

SHEET_COLUMNS = 10
log = logging.getLogger("runtime")
PREVIEW_SIDE, PREVIEW_STEPS = 8, 6  # at most: the latent's shorter side, and the steps
# What makes an image, with the defaults; its file's metadata holds the same keys.
DEFAULTS: dict[str, Any] = {
    "label": None,
    "count": 1,
    "latent": None,
    "image": None,
    "crop": None,
    "exact": False,
    "solver": SOLVER,
    "spacing": None,
    "steps": None,
    "guidance": None,
    "guidance_interval": WHOLE,
    "eta": 0.0,
    "seed": 0,
    "first_index": 0,
    "noise": "coherent",
    "continue_at": None,
    "continue_from": None,
    "init": None,
    "mask": None,
    "strength": None,
    "seam": None,
    "ground": None,
    "quality": None,
}
FILES = ("init", "mask")  # of which a request holds the SHA-256


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.generate", __doc__)
    add = p.add_argument
    words = "names or numbers: 7 | cat,dog | 0-9 | 7:red (two parts of one) | 3+8 or 3*0.7+8*0.3"
    add("--label", help=f"{words} (mixtures) | none (default: each, of the first part)")
    add("--count", type=cli.number(1, 10_000, int), help="images per label (1)")
    add("--latent", type=cli.size, help="HxW of the latent (the bundle's default)")
    cli.add_image(p, "HxW of the image (the training ratio of the latent)")
    add("--solver", choices=tuple(SOLVERS), help=f"how steps are made ({SOLVER})")
    steps = ", ".join(f"{name}: {own.steps}" for name, own in SOLVERS.items())
    add("--steps", type=cli.number(1, 10_000, int), help=f"evaluations of the model ({steps})")
    spacing = ", ".join(f"{name}: {own.spacing}" for name, own in SOLVERS.items())
    add(
        "--spacing",
        choices=SPACINGS,
        help=f"what steps are even in ({spacing}; or the schedule's)",
    )
    scale = "guidance_scale; 1 is the label alone (the bundle's, mostly 2)"
    add("--guidance", type=cli.number(-100, 100), help=scale)
    interval = "t within which --guidance counts, else it is 1: no null branch to compute (0..1)"
    add("--guidance-interval", type=cli.interval, metavar="LOW..HIGH", help=interval)
    add("--eta", type=cli.number(0, 10), help="fresh noise per step; 0 is deterministic (0)")
    add("--seed", type=cli.number(0, (1 << 63) - 1, int), help="seed of the noise (0)")
    add("--first-index", type=cli.number(0, 1 << 40, int), help="index of the first image (0)")
    kinds = ("coherent", "independent")
    add("--noise", choices=kinds, help="coherent: one seed, one picture at any size (coherent)")
    larger = "HxW of a larger latent, which takes the steps from --continue-from on"
    add("--continue-at", type=cli.size, help=larger)
    add("--continue-from", type=cli.number(1, 10_000, int), help="step number (half the steps)")
    strength = "t of the noise: 0 is --init again, 1 what there is without (0.6; with --mask 1)"
    add("--init", type=Path, help="a picture to begin with, at the noise of --strength")
    add("--strength", type=cli.number(0, 1), help=strength)
    add("--mask", type=Path, help="a picture of where --init is drawn anew: white; black is kept")
    seam = "pixels in which kept and drawn pass over, within the white (1/16 of the shorter side)"
    add("--seam", type=cli.number(0, cli.LARGEST_SIDE, int), help=seam)
    add("--vary", type=cli.number(1, 10_000, int), metavar="N", help="draw N variants of --init")
    cli.add_ground(p)
    few = f"first write OUT-preview.png: {PREVIEW_STEPS} steps with {PREVIEW_SIDE} cells a side"
    add("--preview", action="store_true", help=few)
    add("--state", type=Path, help="also keep what runtime.render draws from, as NAME.npz")
    out = "a PNG, JPEG or WebP of all, or one each, as in 'digit-{index:03}-{label}-{seed}.png'"
    add("--out", type=Path, default=Path("out.png"), help=out)
    add("--batch", type=cli.number(1, 4096, int), default=8, help="images drawn at once (8)")
    add("--from-png", type=Path, help="repeat what made this picture; other options override it")
    cli.add_drawing_options(p)
    cli.add_engine_options(p)
    return p


def request(args: argparse.Namespace) -> dict[str, Any]:
    """The images asked for: options over a picture's metadata over the defaults."""
    made = dict(DEFAULTS)
    if args.from_png is not None:
        from runtime.images.pixels import read_metadata

        metadata = read_metadata(args.from_png)
        made = repeated(args.from_png, metadata)
        args.precision = args.precision or made_in(args.from_png, metadata)
    if args.vary is not None:
        if args.init is None or args.count is not None:
            raise UsageError("--vary counts variants of a picture; expected --init, and no --count")
        args.count = args.vary
    given = {key: getattr(args, key) for key in DEFAULTS if key not in FILES}
    return made | {key: value for key, value in given.items() if value is not None}


def generate(args: argparse.Namespace) -> None:
    """Check the request and the output, then draw batch after batch."""
    from runtime.sampling.request import Request

    wanted = request(args)
    bundle = cli.open_bundle(args)
    if args.from_png is not None:
        check_bundle(bundle, args.from_png)
    pictures = read_pictures(args, wanted, bundle.interface.color_channels)
    resolve(bundle, wanted, pictures)
    images = len(wanted["label"]) * wanted["count"]
    if images > MOST_IMAGES:
        raise UsageError(f"{images} images are asked for; expected at most {MOST_IMAGES}")
    each: list[Label] = [label for label in wanted["label"] for _ in range(wanted["count"])]
    runs = [(wanted, args.out)]
    if args.preview:
        runs.insert(0, (preview(bundle, wanted), args.out.with_stem(f"{args.out.stem}-preview")))
    requests = [Request(each, **settings(own), **pictures) for own, _ in runs]
    for asked in requests:
        bundle.check(asked, args.batch)
    drawings = [
        Drawing(
            bundle,
            own["continue_at"] or own["latent"],
            own["image"],
            own["crop"],
            own["exact"],
            args.memory,
            bundle.kept(asked, own["image"]),
        )
        for (own, _), asked in zip(runs, requests, strict=True)
    ]
    names = bundle.interface.labels
    paths = [output_paths(out, own, each, names) for own, out in runs]
    for drawing, files in zip(drawings, paths, strict=True):
        singles = len(files) == len(each)
        drawing.check_file(files[0], *((1, 1) if singles else (len(each), columns(wanted))))
    if args.state is not None:
        check_state(args.state, wanted)
    if (warning := bundle.interface.warning(wanted["continue_at"] or wanted["latent"])) is not None:
        log.warning(warning)
    with bundle.opening(*requests):  # beside what else is to be loaded
        import runtime.images.pixels  # noqa: F401
    for drawing in drawings:
        drawing.check()
    for (own, _), drawing, files in zip(runs, drawings, paths, strict=True):
        latents = draw(drawing, own, pictures, each, files, args.batch)
    if args.state is not None:
        bundle.state(latents, describe(bundle, wanted)).save(args.state)


def settings(wanted: dict[str, Any]) -> dict[str, Any]:
    """The part of a request that all its images share, as `Request` names it."""
    own = ("label", "count", "crop", "exact", "guidance", "first_index")
    files = (*FILES, "ground", "quality")
    shared = {name: value for name, value in wanted.items() if name not in own + files}
    return shared | {"guidance_scale": wanted["guidance"]}


def preview(bundle: "Bundle", wanted: dict[str, Any]) -> dict[str, Any]:
    """The request at a small latent and image and with few steps: the same pictures, rougher.

    The steps are the default solver's, which draws what others do in fewer.
    """
    interface = bundle.interface
    height, width = shrunk(wanted["continue_at"] or wanted["latent"], PREVIEW_SIDE)
    small = interface.latent_sides.nearest(height), interface.latent_sides.nearest(width)
    image = interface.image_size(small)
    if interface.decoupled:
        image = shrunk(wanted["image"], PREVIEW_SIDE * interface.pixels_per_latent)
    if wanted["noise"] == "independent" and small != wanted["latent"]:
        raise UsageError(
            f"--preview draws at {small[0]}x{small[1]}, where independent noise makes another "
            "picture; expected --noise coherent"
        )
    size = {"latent": small, "image": image, "continue_at": None, "continue_from": None}
    size["crop"] = None
    if wanted["seam"]:
        size["seam"] = -(-wanted["seam"] * min(image) // min(wanted["image"]))
    few = {"solver": SOLVER, "spacing": default_spacing(bundle, SOLVER, small)}
    return wanted | size | few | {"steps": min(PREVIEW_STEPS, wanted["steps"])}


def default_spacing(bundle: "Bundle", solver: str, latent: tuple[int, int]) -> str:
    """The spacing of a run for which none is asked."""
    from runtime.sampling.schedule import read
    from runtime.sampling.solvers import spacing_of

    return spacing_of(solver, read(bundle.manifest.schedule, latent))


def shrunk(size: tuple[int, int], side: int) -> tuple[int, int]:
    """The size of the same aspect whose shorter side is at most `side`."""
    scale = min(1.0, side / min(size))
    return max(1, round(size[0] * scale)), max(1, round(size[1] * scale))


def check_state(path: Path, wanted: dict[str, Any]) -> None:
    """Raise UsageError or ResourceError where no state can be written."""
    if wanted["mask"] is not None:
        raise UsageError(
            "--state keeps latents, in which there are no pixels that --mask could keep; expected "
            "one of them"
        )
    if path.suffix.lower() != ".npz":
        raise UsageError(f"--state {path}: expected a name that ends in .npz")
    check_writable(path)


def check_bundle(bundle: "Bundle", png: Path) -> None:
    """Raise ArtefactError where a PNG was made by another checkpoint than this bundle's."""
    from runtime.images.pixels import read_metadata

    metadata = read_metadata(png)
    made, here = metadata.get("checkpoint"), checkpoint_of(bundle)
    if made == here and metadata.get("manifest") != bundle.manifest.sha256:
        log.warning(
            "%s: drawn by another bundle of this checkpoint; pixels may differ by a grey level", png
        )
    if made != here:
        raise ArtefactError(
            f"{png}: made by checkpoint {made}; this bundle has {here}. Pass its bundle: --engine"
        )


def checkpoint_of(bundle: "Bundle") -> str | None:
    """The SHA-256 of the checkpoint that a bundle was made from; None where it had none."""
    source = bundle.manifest.checkpoint
    return None if source is None else source.sha256


def resolve(bundle: "Bundle", wanted: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Fill in what the bundle and a picture decide, and the numbers of labels that are named."""
    from runtime.sampling.labels import Labels

    interface = bundle.interface
    if wanted["label"] is None:
        wanted["label"] = ([] if pictures else [*interface.first_part]) or [None]
    elif isinstance(wanted["label"], str):
        known = Labels(interface.labels, interface.parts)
        wanted["label"] = known.listed(wanted["label"])
    resolve_edit(bundle, wanted, pictures)
    solver = SOLVERS[wanted["solver"]]
    wanted["spacing"] = wanted["spacing"] or default_spacing(
        bundle, wanted["solver"], wanted["latent"]
    )
    wanted["steps"] = wanted["steps"] or solver.steps
    if wanted["guidance"] is None:
        wanted["guidance"] = interface.guidance_scale
    if wanted["continue_at"]:
        wanted["continue_from"] = wanted["continue_from"] or wanted["steps"] // 2


def draw(
    drawing: Drawing,
    wanted: dict[str, Any],
    pictures: dict[str, Any],
    each: "list[Label]",
    paths: list[Path],
    batch: int,
) -> Any:
    """Draw every image in batches; single files are written as soon as they are drawn.

    Returns the latents, float32 `[N, C, H, W]`.
    """
    import numpy as np

    from runtime.progress import Bar
    from runtime.sampling.request import Request

    bundle = drawing.bundle
    latents: list[Any] = []  # [1, C, H, W] of each image
    one = Request(each[:1], **settings(wanted), **pictures)
    total = -(-len(each) // batch) * len(one.table(bundle.manifest.schedule))
    with Bar(total=total, desc="generate", unit="step") as bar:

        def on_step(progress: "Progress") -> bool:
            bar.update()
            return cli.signalled()

        for start in range(0, len(each), batch):
            own = each[start : start + batch]
            index = wanted["first_index"] + start
            part = replace(one, labels=own, first_index=index)
            with cli.patient():
                made = bundle.diffuse(part, on_step)
            latents += np.split(made, len(made))
            for offset in range(len(own) if len(paths) == len(each) else 0):
                single = {"label": [own[offset]], "count": 1, "first_index": index + offset}
                metadata = describe(bundle, wanted | single)
                image = drawn(drawing, latents[start + offset])
                drawing.save(paths[start + offset], [image], 1, metadata, wanted["quality"])
    if len(paths) < len(each):
        images, metadata = [drawn(drawing, latent) for latent in latents], describe(bundle, wanted)
        drawing.save(paths[0], images, columns(wanted), metadata, wanted["quality"])
    print(f"{paths[0]}" + (f" … {paths[-1]}" if len(paths) > 1 else ""))
    return np.concatenate(latents)


def columns(wanted: dict[str, Any]) -> int:
    """How many images a row of the sheet has: those of a label, if they are several and fit."""
    return wanted["count"] if 1 < wanted["count"] <= 2 * SHEET_COLUMNS else SHEET_COLUMNS


def drawn(drawing: Drawing, latent: Any) -> "Iterator[Rows]":
    """The bands of one latent's image; its state is made when the first is asked for."""
    yield from drawing.bands(drawing.bundle.state(latent))


def describe(bundle: "Bundle", wanted: dict[str, Any]) -> dict[str, Any]:
    """A picture's metadata: all that is needed to make it again."""
    return {
        "request": wanted | {"label": [*map(label_to_json, wanted["label"])]},
        "model": bundle.interface.name,
        "checkpoint": checkpoint_of(bundle),
        "manifest": bundle.manifest.sha256,
        "precision": bundle.options.precision,
        "provider": bundle.provider,
        "provider_options": dict(bundle.options.provider_options),
    }


if __name__ == "__main__":
    cli.run(generate, parser())
