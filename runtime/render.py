"""Draw any size or crop of a saved state: python -m runtime.render state.npz --image 8192x8192.

The state is what `runtime.generate --state` keeps of its latents: no diffusion is run again.
"""

import argparse
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime import cli
from runtime.bundle.files import check_writable
from runtime.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from runtime.bundle.state import DecodeState
    from runtime.images.png import Rows
    from runtime.pipeline.bundle import Bundle
    from runtime.pipeline.editing import Kept

log = logging.getLogger("runtime")


def parser() -> argparse.ArgumentParser:
    """The command line's options."""
    p = cli.parser("runtime.render", __doc__)
    p.add_argument("state", type=Path, help="an .npz file made by runtime.generate --state")
    cli.add_image(p, "HxW of the whole image")
    p.add_argument("--index", type=cli.number(0, 100_000, int), default=0, help="which image (0)")
    p.add_argument("--out", type=Path, help="file to write (a PNG beside the state, with its size)")
    cli.add_drawing_options(p)
    cli.add_engine_options(p)
    return p


def render(args: argparse.Namespace) -> None:
    """Load the state, draw the window asked for, band by band."""
    from runtime.bundle.state import DecodeState
    from runtime.pipeline.tiles import window_of

    height, width = cli.wanted_image(args)
    out = cli.picture_name(
        args.out or args.state.with_name(f"{args.state.stem}-{height}x{width}.png")
    )
    window_of(args.crop, args.image)
    check_writable(out)
    state = DecodeState.load(args.state)
    if args.index >= len(state):
        raise UsageError(f"--index {args.index}: {args.state} holds images 0 to {len(state) - 1}")
    bundle = cli.open_bundle(args)
    drawing = Drawing(bundle, state.latent, args.image, args.crop, bool(args.exact), args.memory)
    drawing.check_file(out)
    drawing.check(state, str(args.state))
    images = [drawing.bands(state, args.index)]
    drawing.save(out, images, 1, described(state.metadata, args, drawing.exact), args.quality)
    print(out)


def described(made: dict[str, Any], args: argparse.Namespace, exact: bool) -> dict[str, Any]:
    """The PNG's metadata: those of the state, its request narrowed to the image drawn.

    Raises ArtefactError where the request is not whole.
    """
    try:
        request = made["request"]
        own = {
            "label": [request["label"][args.index // request["count"]]],
            "count": 1,
            "first_index": request["first_index"] + args.index,
            "image": args.image,
            "crop": args.crop,
            "exact": exact,
        }
        return made | {"request": request | own}
    except (KeyError, TypeError, IndexError, ZeroDivisionError) as error:
        raise ArtefactError(
            f"{args.state}: its metadata holds no whole request ({type(error).__name__}: {error}); "
            "expected a state made by runtime.generate, unaltered"
        ) from None


class Drawing:
    """How images are drawn from a state into a file: sizes, crop, memory, what an edit keeps."""

    def __init__(
        self,
        bundle: "Bundle",
        latent: tuple[int, int],
        size: tuple[int, int],
        crop: tuple[int, int, int, int] | None,
        exact: bool,
        memory: int | None,
        kept: "Kept | None" = None,
    ):
        from runtime.pipeline.tiles import window_of

        bundle.resampler.check_draw(size)
        self.bundle, self.latent, self.size, self.crop = bundle, latent, size, crop
        self.exact, self.memory, self.kept = exact, memory, kept
        self.window = window_of(crop, size)

    def check_file(self, path: Path, count: int = 1, columns: int = 1) -> None:
        """Raise UsageError where a file of this name cannot hold a sheet of `count` images."""
        from runtime.images.formats import check_size
        from runtime.images.pixels import sheet_size

        check_size(path, sheet_size(count, columns, self.window[2:]))

    def check(self, state: "DecodeState | None" = None, source: str = "") -> None:
        """Open every graph that drawing needs; raises ArtefactError or ResourceError."""
        resampler = self.bundle.resampler
        if state is not None:
            resampler.check_decode_state(state, source)
        self.bundle.engines.open_all(resampler.drawing(self.latent, self.size))
        if self.memory is not None:
            resampler.check_memory(self.memory, self.latent, self.size)

    def bands(self, state: "DecodeState", index: int = 0) -> "Iterator[Rows]":
        """One image of a state as uint8 bands `[n, w, c]` from the top."""
        from runtime.images.pixels import to_uint8

        draw, top = self.bundle.resampler.draw, self.window.top
        for band in draw(state, self.size, self.crop, self.exact, self.memory, index):
            own = band[None]
            if self.kept is not None:
                own = self.kept.paste(own, top, self.window.left)
            top += band.shape[1]
            yield to_uint8(own[0])

    def save(
        self,
        path: Path,
        images: "Sequence[Iterator[Rows]]",
        columns: int,
        metadata: dict[str, Any],
        quality: int | None = None,
    ) -> None:
        """Write images as one file, a contact sheet of `columns`; a PNG as they are drawn."""
        from runtime.images.pixels import save_rows, sheet_rows, sheet_size
        from runtime.progress import Bar

        height, width = sheet_size(len(images), columns, (self.window.height, self.window.width))
        channels = self.bundle.interface.color_channels
        with Bar(total=height, desc=path.name, unit="row", leave=False, delay=1) as bar:

            def drawn() -> "Iterator[Rows]":
                for band in sheet_rows(images, columns):
                    yield band
                    bar.update(len(band))

            shape = (height, width, channels)
            if not save_rows(path, drawn(), shape, metadata, quality):
                log.warning("%s holds no metadata: they are too long for its kind of file", path)


if __name__ == "__main__":
    cli.run(render, parser())
