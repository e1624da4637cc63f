"""The pictures of an edit: read from the files of --init and --mask, and known by their hashes."""

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.bundle.files import read_bytes, sha256
from runtime.bundle.interface import Size, size_name
from runtime.errors import ArtefactError, UsageError

if TYPE_CHECKING:
    from runtime.pipeline.bundle import Bundle

BLACK = (0, 0, 0)  # under a mask's transparent pixels: they are kept
MOST_BYTES = 1 << 30  # of a file, which is held as it is hashed and read
STRETCHED = 1.02  # times another aspect, from which a mask may be of another picture
log = logging.getLogger("runtime")


def read_pictures(
    args: argparse.Namespace, wanted: dict[str, Any], channels: int
) -> dict[str, Any]:
    """What `Request` takes as `init` and `mask`, where there are such: float32 `[1, c, h, w]`.

    `wanted` gets the SHA-256 of each; where it has one of --from-png the file must be that one.
    Raises UsageError for a file that is missing, ArtefactError for another or no picture.
    """
    from runtime.images.picture import WHITE, ImageFile

    found: dict[str, Any] = {}
    if args.init or wanted["init"]:
        wanted["ground"] = args.ground or wanted["ground"] or WHITE
    for name, own, ground in (("init", channels, wanted["ground"]), ("mask", 1, BLACK)):
        if (path := file_of(name, args, wanted[name])) is None:
            continue
        data = read_bytes(path, "an image", "Give the path of an image file", MOST_BYTES)
        check_hash(path, sha256(data), args.from_png, wanted[name])
        wanted[name] = sha256(data)
        taker = "the model" if name == "init" else "a mask"
        with ImageFile(path, own, ground, data, taker) as image:
            pixels = image.whole()
            if image.notes:
                log.warning("%s: %s", path, "; ".join(image.notes))
        found[name] = pixels if name == "init" else (pixels + 1) / 2
    return found


def file_of(name: str, args: argparse.Namespace, made_of: str | None) -> Path | None:
    """The file given for a picture; raises UsageError where --from-png needs one that is not."""
    path: Path | None = getattr(args, name)
    if path is None and made_of is not None:
        raise UsageError(
            f"{args.from_png}: was made with --{name}, a file of SHA-256 {made_of}. Pass that file "
            f"again: --{name} FILE"
        )
    return path


def check_hash(path: Path, found: str, png: Path | None, made_of: str | None) -> None:
    """Raise ArtefactError where a file is not the one that a picture was made of."""
    if made_of not in (None, found):
        raise ArtefactError(
            f"{path}: has SHA-256 {found}; {png} was made with a file of {made_of}. Pass that one, "
            "or give the options without --from-png"
        )


def resolve_edit(bundle: "Bundle", wanted: dict[str, Any], pictures: dict[str, Any]) -> None:
    """Fill in the sizes and, for an edit, the numbers that its request leaves open."""
    from runtime.sampling.request import Request

    wanted["latent"] = wanted["latent"] or bundle.default_latent(pictures.get("init"))
    names = ("latent", "image", "continue_at", "strength", "seam")
    request = Request([None], **{name: wanted[name] for name in names}, **pictures)
    wanted["image"] = request.drawn_size(bundle.interface)
    if request.init is None:
        return
    wanted["strength"] = request.start_time
    own = request.init.shape[2:]
    if request.mask is not None:
        wanted["seam"] = request.seam_width(wanted["image"])
        say_stretched(request.mask.shape[2:], own)
    if own != wanted["image"] and (request.mask is not None or not bundle.interface.decoupled):
        sizes = size_name(own), size_name(wanted["image"])
        log.warning("the picture of %s is taken at %s, and what is kept of it with it", *sizes)


def say_stretched(mask: Size, picture: Size) -> None:
    """A note where a mask has another aspect than the picture that it is laid on."""
    change = mask[0] * picture[1] / (mask[1] * picture[0])
    if max(change, 1 / change) > STRETCHED:
        sizes = size_name(mask), size_name(picture)
        log.warning("the mask of %s is stretched to the aspect of the picture of %s", *sizes)
