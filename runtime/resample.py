"""Resample an image through R2IR: python -m runtime.resample photo.png --size 512x512."""

import argparse
from pathlib import Path

from runtime import cli
from runtime.errors import UsageError
from runtime.files import check_writable


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = argparse.ArgumentParser(prog="python -m runtime.resample", description=__doc__)
    p.add_argument("input", type=Path, help="an image file")
    p.add_argument("--size", type=cli.size, required=True, help="HxW of the result")
    p.add_argument("--latent", type=cli.size, help="HxW of the latent (the training ratio)")
    p.add_argument("--out", type=Path, help="PNG to write (beside the input, with its new size)")
    cli.add_engine_options(p)
    return p


def resample(args: argparse.Namespace) -> None:
    """Encode the image, decode it at the new size, write it."""
    from runtime.images import load_pixels, save_png, to_uint8

    height, width = args.size
    out: Path = args.out or args.input.with_name(f"{args.input.stem}-{height}x{width}.png")
    if out.suffix.lower() != ".png":
        raise UsageError(f"--out {out}: expected a name that ends in .png")
    check_writable(out)
    pipeline = cli.open_bundle(args)
    pipeline.check_size("r2ir_decode", args.size)
    pixels = load_pixels(args.input, pipeline.model.r2ir.color_channels)
    result = pipeline.resample(pixels, args.size, args.latent)
    save_png(out, to_uint8(result[0]), {"model": pipeline.model.name, "resampled": args.input.name})
    print(out)


if __name__ == "__main__":
    cli.run(resample, parser())
