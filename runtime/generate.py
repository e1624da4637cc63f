"""Draw images from a bundle: python -m runtime.generate --label 7 --image 256x256."""

import argparse
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.errors import ArtefactError, UsageError
from runtime.files import check_writable
from runtime.render import Drawing

if TYPE_CHECKING:
    from runtime.pipeline import Label, Pipeline
    from runtime.png import Rows

SHEET_COLUMNS = 10
MOST_IMAGES = 100_000
# What makes an image, with the defaults; a PNG's metadata holds the same keys.
DEFAULTS: dict[str, Any] = {
    "label": None,
    "count": 1,
    "latent": None,
    "image": None,
    "crop": None,
    "exact": False,
    "steps": 50,
    "guidance": 2.0,
    "eta": 0.0,
    "seed": 0,
    "first_index": 0,
}
TERM = re.compile(r"(\d{1,6})(?:\*(\d*\.?\d+))?")


def labels(text: str) -> "list[Label]":
    """`7`, `1,3`, `0-9`, `none`, and mixtures with weights: `3+8` or `3*0.7+8*0.3`."""
    found: list[Label] = []
    for part in text.split(","):
        terms = [TERM.fullmatch(term.strip()) for term in part.split("+")]
        if part.strip() == "none":
            found.append(None)
        elif ("+" in part or "*" in part) and all(terms):
            shares = [float(m[2]) if m and m[2] else 1 / len(terms) for m in terms]
            numbers = [int(m[1]) for m in terms if m]
            found.append(dict(zip(numbers, shares, strict=True)))
        else:
            found += cli.integers(part)
    return found


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser(prog="python -m runtime.generate", description=__doc__)
    add = p.add_argument
    add("--label", type=labels, help="7 | 1,3 | 0-9 | none | 3*0.7+8*0.3 (default: every label)")
    add("--count", type=cli.number(1, 10_000, int), help="images per label (1)")
    add("--latent", type=cli.size, help="HxW of the latent (the bundle's default)")
    add("--image", type=cli.size, help="HxW of the image (the training ratio of the latent)")
    add("--steps", type=cli.number(1, 10_000, int), help="DDIM steps (50)")
    add("--guidance", type=cli.number(-100, 100), help="guidance_scale; 1 is the label alone (2)")
    add("--eta", type=cli.number(0, 10), help="fresh noise per step; 0 is deterministic (0)")
    add("--seed", type=cli.number(0, (1 << 63) - 1, int), help="seed of the noise (0)")
    add("--first-index", type=cli.number(0, 1 << 40, int), help="index of the first image (0)")
    add("--state", type=Path, help="also keep what runtime.render draws from, as NAME.npz")
    add("--out", type=Path, default=Path("out.png"), help="one PNG, or 'name-{index}.png' for each")
    add("--batch", type=cli.number(1, 4096, int), default=8, help="images drawn at once (8)")
    add("--from-png", type=Path, help="repeat what made this PNG; other options override it")
    cli.add_drawing_options(p)
    cli.add_engine_options(p)
    return p


def request(args: argparse.Namespace) -> dict[str, Any]:
    """The images asked for: options over a PNG's metadata over the defaults."""
    made = dict(DEFAULTS)
    if args.from_png is not None:
        from runtime.images import read_metadata

        made = repeated(args.from_png, read_metadata(args.from_png))
    given = {key: getattr(args, key) for key in DEFAULTS}
    return made | {key: value for key, value in given.items() if value is not None}


def repeated(png: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    """The request in a PNG's metadata; raises ArtefactError where it is not whole."""
    try:
        return {key: _from_json(key, metadata["request"][key]) for key in DEFAULTS}
    except (
        *(KeyError, TypeError, ValueError, IndexError, AttributeError),
        argparse.ArgumentTypeError,
    ) as error:
        raise ArtefactError(
            f"{png}: its metadata holds no whole request ({type(error).__name__}: {error}); "
            "expected a PNG made by runtime.generate, unaltered"
        ) from None


def _from_json(key: str, value: Any) -> Any:
    if key in ("latent", "image"):
        height, width = value
        return int(height), int(width)
    if key == "crop":
        return None if value is None else cli.crop(",".join(map(str, value)))
    if key == "label":
        return [_label_from_json(label) for label in value]
    return type(DEFAULTS[key])(value)


def _label_from_json(label: Any) -> "Label":
    if isinstance(label, Mapping):
        return {int(number): float(weight) for number, weight in label.items()}
    return None if label is None else int(label)


def output_paths(out: Path, count: int, first_index: int) -> list[Path]:
    """One file for a sheet, or one per image where the name holds `{index}`; checked."""
    if "{index}" not in out.name:
        paths = [out]
    else:
        indices = range(first_index, first_index + count)
        paths = [out.with_name(out.name.replace("{index}", str(i))) for i in indices]
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    for path in paths:
        check_writable(path)
    return paths


def generate(args: argparse.Namespace) -> None:
    """Check the request and the output, then draw batch after batch."""
    wanted = request(args)
    pipeline = cli.open_bundle(args)
    if args.from_png is not None:
        check_bundle(pipeline, args.from_png)
    resolve(pipeline, wanted)
    each: list[Label] = [label for label in wanted["label"] for _ in range(wanted["count"])]
    if len(each) > MOST_IMAGES:
        raise UsageError(f"{len(each)} images are asked for; expected at most {MOST_IMAGES}")
    settings = {k: wanted[k] for k in ("latent", "steps", "eta", "seed")}
    settings["guidance_scale"] = wanted["guidance"]
    pipeline.check_request(each, image=wanted["image"], **settings)
    drawing = Drawing(pipeline, wanted["image"], wanted["crop"], wanted["exact"], args.memory)
    paths = output_paths(args.out, len(each), wanted["first_index"])
    if args.state is not None:
        check_state(args.state)
    drawing.check()
    draw(drawing, wanted, each, settings, paths, args)


def check_state(path: Path) -> None:
    """Raise UsageError or ResourceError where no state can be written."""
    if path.suffix.lower() != ".npz":
        raise UsageError(f"--state {path}: expected a name that ends in .npz")
    check_writable(path)


def check_bundle(pipeline: "Pipeline", png: Path) -> None:
    """Raise ArtefactError where a PNG was made by another checkpoint than this bundle's."""
    from runtime.images import read_metadata

    made, here = (
        read_metadata(png).get("checkpoint"),
        pipeline.manifest.checkpoint.get("sha256"),
    )
    if made != here:
        raise ArtefactError(
            f"{png}: made by checkpoint {made}; this bundle has {here}. Pass its bundle: --engine"
        )


def resolve(pipeline: "Pipeline", wanted: dict[str, Any]) -> None:
    """Fill in what the bundle decides."""
    if wanted["label"] is None:
        wanted["label"] = list(range(pipeline.model.condition.labels))
    wanted["latent"] = wanted["latent"] or pipeline.model.default_latent
    wanted["image"] = wanted["image"] or pipeline.image_size(wanted["latent"])


def draw(
    drawing: Drawing,
    wanted: dict[str, Any],
    each: "list[Label]",
    settings: dict[str, Any],
    paths: list[Path],
    args: argparse.Namespace,
) -> None:
    """Draw every image in batches; single files are written as soon as they are drawn."""
    import numpy as np
    from tqdm import tqdm

    pipeline = drawing.pipeline
    latents: list[Any] = []  # [1, C, H, W] of each image
    total = -(-len(each) // args.batch) * settings["steps"]
    with tqdm(total=total, desc="generate", unit="step") as bar:
        for start in range(0, len(each), args.batch):
            own = each[start : start + args.batch]
            index = wanted["first_index"] + start
            made = pipeline.diffuse(
                own, **settings, first_index=index, on_step=lambda step: bar.update()
            )
            latents += np.split(made, len(made))
            for offset in range(len(own) if len(paths) == len(each) else 0):
                single = {"label": [own[offset]], "count": 1, "first_index": index + offset}
                metadata = describe(pipeline, wanted | single)
                image = drawn(drawing, latents[start + offset])
                drawing.save(paths[start + offset], [image], 1, metadata)
    if len(paths) < len(each):
        columns = wanted["count"] if 1 < wanted["count"] <= 2 * SHEET_COLUMNS else SHEET_COLUMNS
        images = [drawn(drawing, latent) for latent in latents]
        drawing.save(paths[0], images, columns, describe(pipeline, wanted))
    if args.state is not None:
        pipeline.state(np.concatenate(latents), describe(pipeline, wanted)).save(args.state)
    print(f"{paths[0]}" + (f" … {paths[-1]}" if len(paths) > 1 else ""))


def drawn(drawing: Drawing, latent: Any) -> "Iterator[Rows]":
    """The bands of one latent's image; its state is made when the first is asked for."""
    yield from drawing.bands(drawing.pipeline.state(latent))


def describe(pipeline: "Pipeline", wanted: dict[str, Any]) -> dict[str, Any]:
    """A PNG's metadata: all that is needed to make it again."""
    engine = pipeline.engine("r2id")
    return {
        "request": wanted,
        "model": pipeline.model.name,
        "checkpoint": pipeline.manifest.checkpoint.get("sha256"),
        "manifest": pipeline.manifest.sha256,
        "precision": pipeline.manifest.graph("r2id").precision,
        "provider": engine.provider,
    }


if __name__ == "__main__":
    cli.run(generate, parser())
