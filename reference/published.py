"""Convert checkpoints of published code into ours, whichever family they are of.

python -m reference.published r2ir.pt r2id.pt text.pt OUT      R2
python -m reference.published denoiser.pt text.pt OUT          SIID, S2ID
python -m reference.published hdit.safetensors OUT             k-diffusion's HDiT: slim, or .pt

Files are told apart by the tensors in them. What shapes do not tell is asked for. Nothing in a file
is run: a pickle that holds more than tensors and plain data is refused.
"""

import argparse
import io
import json
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from reference import checkpoint
from reference.families import FAMILIES, Conversion, Family
from reference.families.parts.published import Published
from runtime import cli
from runtime.bundle.files import check_writable, parsing, read_bytes, sha256
from runtime.errors import ArtefactError, UsageError

WEIGHTS = ("model_ema", "model")  # of a training checkpoint, the averaged ones first
LISTED = 3  # names of tensors in an error


def read_file(path: Path) -> Published:
    """Tensors and settings of a file; raises ArtefactError for one that holds neither."""
    if path.suffix == ".safetensors":
        data = read_bytes(path, "a published checkpoint (.safetensors)", "Check its name")
        tensors, metadata = checkpoint.parse(data, path)
        return Published(path, tensors, parse_settings(metadata.get("config"), path))
    loaded = read_pickle(path)
    settings = None
    if not all(isinstance(value, Tensor) for value in loaded.values()):
        key = next((key for key in WEIGHTS if isinstance(loaded.get(key), Mapping)), None)
        if key is None:
            found = ", ".join(map(str, list(loaded)[:LISTED]))
            raise ArtefactError(
                f"{path}: holds {found} …; expected a state dict, or a training checkpoint with "
                f"{' or '.join(WEIGHTS)}"
            )
        settings, loaded = loaded.get("config"), loaded[key]
        if not all(isinstance(value, Tensor) for value in loaded.values()):
            raise ArtefactError(f"{path}: {key} holds more than tensors; expected a state dict")
    return Published(path, checked(path, loaded, path.stat().st_size), settings)


def read_pickle(path: Path) -> Mapping[str, Any]:
    """What torch.save wrote, read without running code; raises ArtefactError."""
    data = read_bytes(path, "a state dict (.pt)", "Check its name")
    with parsing(path, "state dict that torch can read", "Copy it again"):
        check_packed(data)
        try:
            loaded = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            reason = str(error).split("\n")[0]
            raise ArtefactError(
                f"{path}: refused, since its pickle asks for more than tensors ({reason}). "
                "Save a plain state dict: torch.save(model.state_dict(), path)"
            ) from None
    if not isinstance(loaded, Mapping) or not loaded:
        raise ArtefactError(f"{path}: holds {type(loaded).__name__}; expected a dict of tensors")
    return loaded


def check_packed(data: bytes) -> None:
    """Raise ValueError for an archive that unpacks to more than it is; torch packs nothing."""
    if zipfile.is_zipfile(io.BytesIO(data)):
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            unpacked = sum(info.file_size for info in archive.infolist())
        if unpacked > len(data):
            raise ValueError(f"it unpacks to {unpacked} bytes from {len(data)}")


def checked(path: Path, tensors: Mapping[Any, Any], size: int) -> dict[str, Tensor]:
    """Plain tensors by name, out of a file of `size` bytes; raises ArtefactError for others."""
    for name, tensor in tensors.items():
        plain = isinstance(name, str) and isinstance(tensor, Tensor)
        plain = plain and tensor.layout is torch.strided and tensor.device.type == "cpu"
        if not plain or tensor.is_quantized or tensor.numel() * tensor.element_size() > size:
            what = str(getattr(tensor, "dtype", type(tensor).__name__))
            raise ArtefactError(
                f"{path}: {str(name)[:100]!r} is no plain tensor ({what}); expected a state dict. "
                "Save one with: torch.save(model.state_dict(), path)"
            )
    return dict(tensors)


def parse_settings(text: str | bytes | None, path: Path) -> Any:
    """A JSON configuration; raises ArtefactError for text that is none."""
    with parsing(path, "JSON configuration", "Copy it again"):
        return None if text is None else json.loads(text)


def read_files(paths: list[Path], config: Path | None) -> list[Published]:
    """Every file; a .json among them, or `config`, is the settings of them all."""
    texts = [path for path in [*paths, config] if path is not None and path.suffix == ".json"]
    if config is not None and config not in texts:
        raise UsageError(f"--config {config}: expected a .json file")
    if len(texts) > 1:
        raise UsageError(f"{len(texts)} configurations: {texts}; expected one at most")
    files = [read_file(path) for path in paths if path not in texts]
    if texts:
        data = read_bytes(texts[0], "a configuration (.json)", "Check its name")
        settings = parse_settings(data, texts[0])
        files = [Published(file.path, file.tensors, settings) for file in files]
    return files


def recognise(files: list[Published]) -> tuple[Family, Conversion]:
    """The family of the files; raises ArtefactError naming what they hold where there is none."""
    for family in FAMILIES.values():
        if family.published is not None and family.published.recognises(files):
            return family, family.published
    known = sorted(name for name, family in FAMILIES.items() if family.published)
    names = [name for file in files for name in list(file.tensors)[:LISTED]]
    raise ArtefactError(
        f"{', '.join(str(file.path) for file in files)}: tensors such as {', '.join(names)}; "
        f"expected published checkpoints of {', '.join(known)}"
    )


def convert(args: argparse.Namespace) -> None:
    """Read the files, find out their family and write the checkpoint."""
    check_writable(args.out)
    files = read_files(args.files, args.config)
    family, published = recognise(files)
    with parsing(files[0].path, f"published checkpoint of {family.name}", "Check what it holds"):
        config, tensors = published.convert(files, args)
        with torch.device("meta"), checkpoint.at_most(len(tensors)):
            checkpoint.check_tensors(family.models(config), tensors, files[0].path)
        models = family.models(config)
    checkpoint.load_tensors(models, tensors, files[0].path)
    sources = {file.path.name: sha256(file.path.read_bytes()) for file in files}
    checkpoint.save(args.out, models, {"published": sources}, torch.float32)
    print(f"{family.name} checkpoint: {args.out}")


def parser() -> argparse.ArgumentParser:
    """The command line's options; their defaults are the published values."""
    p = cli.parser("reference.published", __doc__)
    p.add_argument("files", type=Path, nargs="+", help="published files of one model, in any order")
    p.add_argument("out", type=Path, help="checkpoint to write (.safetensors)")
    p.add_argument("--config", type=Path, help="HDiT's configuration, where it is not in the file")
    options: list[tuple[str, int | None, str]] = [
        ("heads", None, "attention heads of SIID or S2ID"),
        ("fold", None, "side of the square of pixels that SIID makes a token of"),
        ("r2ir-heads", 6, "attention heads of R2IR"),
        ("r2id-heads", 6, "attention heads of R2ID"),
        ("pixels-per-latent", 8, "R2's image pixels per latent cell in training"),
    ]
    for name, default, text in options:
        kind = cli.number(1, 1024, int)
        shown = text if default is None else f"{text} ({default})"
        p.add_argument(f"--{name}", type=kind, default=default, help=shown)
    p.add_argument("--name", default="published", help="the model's name")
    return p


if __name__ == "__main__":
    cli.run(convert, parser())
