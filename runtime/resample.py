"""Resample an image through a latent: python -m runtime.resample photo.png --image 512x512."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.bundle.files import check_writable
from runtime.errors import ArtefactError
from runtime.render import Drawing

if TYPE_CHECKING:
    from runtime.images.picture import ImageFile
    from runtime.pipeline.bundle import Bundle

log = logging.getLogger("runtime")
FINER = 2  # pixels per pixel of the training ratio, along each side, that are worth reading


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.resample", __doc__)
    p.add_argument("input", type=Path, help="an image file")
    cli.add_image(p, "HxW of the result")
    latent = "HxW of the latent (the training ratio of the smaller of both, within the memory)"
    p.add_argument("--latent", type=cli.size, help=latent)
    p.add_argument("--out", type=Path, help="file to write (a PNG beside the input, with its size)")
    cli.add_ground(p)
    cli.add_drawing_options(p)
    cli.add_engine_options(p)
    return p


def resample(args: argparse.Namespace) -> None:
    """Encode the image by tiles, decode it by tiles at the new size into the file."""
    from runtime.images.picture import WHITE, ImageFile

    height, width = cli.wanted_image(args)
    out = cli.picture_name(
        args.out or args.input.with_name(f"{args.input.stem}-{height}x{width}.png")
    )
    check_writable(out)
    bundle = cli.open_bundle(args)
    bundle.check_resample(args.image)
    ground = args.ground or WHITE
    with ImageFile(args.input, bundle.interface.color_channels, ground) as image:
        size = latent_size(bundle, image, args)
        drawing = Drawing(bundle, size, args.image, args.crop, bool(args.exact), args.memory)
        drawing.check_file(out)
        drawing.check()
        latent = encoded(bundle, image, size, args.memory)
        if image.notes:
            log.warning("%s: %s", args.input, "; ".join(image.notes))
    metadata = {"model": bundle.interface.name, "resampled": args.input.name}
    drawing.save(out, [drawing.bands(bundle.state(latent))], 1, metadata, args.quality)
    print(out)


def latent_size(bundle: "Bundle", image: "ImageFile", args: argparse.Namespace) -> tuple[int, int]:
    """The latent that an image goes through; raises ArtefactError for an image of illegal sides."""
    sides = bundle.interface.image_sides
    if any(side not in sides for side in image.size):
        raise ArtefactError(
            f"{args.input}: {image.size[0]}x{image.size[1]} pixels; expected sides of {sides}"
        )
    return args.latent or bundle.latent_between(image.size, args.image, args.memory)


def encoded(bundle: "Bundle", image: "ImageFile", size: tuple[int, int], memory: int | None) -> Any:
    """The latent `[1, C, *size]` of an image, which is read by windows behind a progress bar."""
    from runtime.progress import Bar

    ratio = bundle.interface.pixels_per_latent
    image.shrink((FINER * ratio * size[0], FINER * ratio * size[1]))
    if (warning := bundle.interface.warning(size)) is not None:
        log.warning(warning)
    pixels = image.size[0] * image.size[1]
    with Bar(total=pixels, desc="read", unit="pixel", unit_scale=True, leave=False) as bar:

        def read(top: int, left: int, height: int, width: int) -> Any:
            bar.update(height * width)
            return image(top, left, height, width)

        return bundle.resampler.encode_windows(read, image.size, size, memory)


if __name__ == "__main__":
    cli.run(resample, parser())
