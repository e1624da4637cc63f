"""Resample an image through a latent: python -m runtime.resample photo.png --size 512x512."""

import argparse
from pathlib import Path

from runtime import cli
from runtime.bundle.files import check_writable
from runtime.render import Drawing


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.resample", __doc__)
    p.add_argument("input", type=Path, help="an image file")
    p.add_argument("--size", type=cli.size, required=True, help="HxW of the result")
    p.add_argument("--latent", type=cli.size, help="HxW of the latent (the training ratio)")
    p.add_argument("--out", type=Path, help="PNG to write (beside the input, with its new size)")
    cli.add_drawing_options(p)
    cli.add_engine_options(p)
    return p


def resample(args: argparse.Namespace) -> None:
    """Encode the image by tiles, decode it by tiles at the new size into the file."""
    from runtime.images.pixels import ImageFile

    height, width = args.size
    out = cli.png_name(args.out or args.input.with_name(f"{args.input.stem}-{height}x{width}.png"))
    check_writable(out)
    bundle = cli.open_bundle(args)
    bundle.check_resample(args.size)
    with ImageFile(args.input, bundle.interface.color_channels) as image:
        size = args.latent or bundle.interface.latent_size(image.size)
        drawing = Drawing(bundle, size, args.size, args.crop, bool(args.exact), args.memory)
        drawing.check()
        latent = bundle.resampler.encode_windows(image, image.size, size, args.memory)
    metadata = {"model": bundle.interface.name, "resampled": args.input.name}
    drawing.save(out, [drawing.bands(bundle.state(latent))], 1, metadata)
    print(out)


if __name__ == "__main__":
    cli.run(resample, parser())
