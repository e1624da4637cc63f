"""Training images: MNIST from its IDX files, grey or painted, or any folder of images.

Images are held as uint8 `[count, c, h, w]` with labels `[count]` int64.
"""

import hashlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from runtime.errors import ArtefactError, UsageError
from runtime.images.idx import MAGIC, read_idx
from runtime.images.picture import ImageFile
from runtime.images.pixels import to_uint8

# SHA-256 of the four standard files, uncompressed (LeCun, Cortes and Burges, "MNIST").
MNIST_SHA256 = {
    "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
    "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
    "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
    "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
}
MNIST_SOURCE = "https://ossci-datasets.s3.amazonaws.com/mnist/"
MNIST_MARGIN = 2  # 28 × 28 digits in 32 × 32 images
IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
# Colours that digits and their grounds are painted in, RGB in 0 … 255.
HUES = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 225, 40),
    "green": (30, 160, 60),
    "cyan": (40, 200, 220),
    "blue": (40, 70, 220),
    "magenta": (200, 50, 190),
    "white": (255, 255, 255),
    "black": (0, 0, 0),
}
GROUND = "on-"  # before a hue's name where it is the ground's


@dataclass(frozen=True)
class Images:
    """Pixels uint8 `[count, c, h, w]`, labels int64 `[count]`, label names.

    `pad`: another aspect ratio shows the whole image on a dark ground, else it crops.
    `painted`: each use of a grey image has a hue and a ground of its own, drawn by `paint`; their
    names are labels too.
    """

    pixels: Tensor
    labels: Tensor
    names: tuple[str, ...]
    pad: bool
    painted: bool = False

    @property
    def parts(self) -> tuple[int, ...]:
        """How many of `names` belong to each part of a condition, in their order."""
        own = len(self.names) - 2 * len(HUES) * self.painted
        return (own, len(HUES), len(HUES)) if self.painted else (own,)

    def __len__(self) -> int:
        return len(self.pixels)

    @property
    def side(self) -> int:
        """Pixels along a side of the images, which are square."""
        return self.pixels.shape[-1]

    def cropped(self, side: int) -> "Images":
        """The middle `side` × `side` of each image; raises UsageError for a larger side."""
        margin, odd = divmod(self.side - side, 2)
        if margin < 0 or odd:
            raise UsageError(
                f"image = {side} of a data set of {self.side} pixels a side; expected "
                "as many or fewer, by an even number"
            )
        middle = slice(margin, margin + side)
        return replace(self, pixels=self.pixels[..., middle, middle])

    def to(self, device: torch.device) -> "Images":
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))


def load_mnist(folder: Path, split: str = "train", check_hash: bool = True) -> Images:
    """MNIST's `train` (60,000) or `t10k` (10,000) split as 32 × 32 grey images.

    `check_hash` compares with the standard files' SHA-256; raises ArtefactError.
    """
    arrays = {}
    for kind in ("images-idx3-ubyte", "labels-idx1-ubyte"):
        name = f"{split}-{kind}"
        source = f"{name}.gz is at {MNIST_SOURCE}, SHA-256 {MNIST_SHA256[name]} unpacked"
        array = read_idx(folder / name, source)
        header = (
            MAGIC + bytes([array.ndim]) + b"".join(side.to_bytes(4, "big") for side in array.shape)
        )
        found = hashlib.sha256(header + array.tobytes()).hexdigest()
        if check_hash and found != MNIST_SHA256[name]:
            raise ArtefactError(
                f"{folder / name}: SHA-256 {found}; expected {MNIST_SHA256[name]} of the "
                "standard file. Copy it again"
            )
        arrays[kind[:6]] = array
    digits, labels = arrays["images"], arrays["labels"]
    if digits.ndim != 3 or labels.shape != digits.shape[:1]:
        raise ArtefactError(
            f"{folder}: images {digits.shape} and labels {labels.shape} do not belong together"
        )
    margin = (MNIST_MARGIN, MNIST_MARGIN)
    pixels = torch.from_numpy(np.pad(digits, ((0, 0), margin, margin)))
    names = tuple(str(digit) for digit in range(10))
    return Images(pixels.unsqueeze(1), torch.from_numpy(labels.astype(np.int64)), names, pad=True)


def load_painted_mnist(folder: Path, split: str = "train") -> Images:
    """MNIST to be painted: labels are the digits, the hues, then the grounds (`on-white`)."""
    grey = load_mnist(folder, split)
    names = (*grey.names, *HUES, *(GROUND + hue for hue in HUES))
    return replace(grey, names=names, painted=True)


def draw_hues(count: int) -> Tensor:
    """Numbers of a stroke's and its ground's hue, int64 `[count, 2]`, never the same two."""
    stroke = torch.randint(len(HUES), (count,))
    ground = (stroke + torch.randint(1, len(HUES), (count,))) % len(HUES)
    return torch.stack([stroke, ground], 1)


def paint(grey: Tensor, hues: Tensor) -> Tensor:
    """Grey `[B, 1, h, w]` in [-1, 1] in the hues `[B, 2]` of stroke and ground: `[B, 3, h, w]`."""
    palette = torch.tensor([*HUES.values()], device=grey.device) / 127.5 - 1
    stroke, ground = palette[hues].unsqueeze(-1).unsqueeze(-1).unbind(1)  # [B, 3, 1, 1] each
    return ground + (stroke - ground) * (grey + 1) / 2


def load_folder(folder: Path, channels: int, side: int, labels: int) -> Images:
    """Every image under `folder`, cropped to its middle square and resized to side × side.

    Sub-folders are the labels in the order of their names; images beside them have label 0.
    `channels` is 1 (grey) or 3 (RGB). Raises ArtefactError for no image, an unreadable one,
    or more label folders than `labels`.
    """
    from PIL import Image, ImageOps

    names = tuple(sorted(path.name for path in folder.glob("*/"))) or ("image",)
    if len(names) > labels:
        raise ArtefactError(
            f"{folder}: {len(names)} label folders; the configuration has {labels} labels. "
            "Raise labels in [model.condition]"
        )
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    if not paths:
        raise ArtefactError(f"{folder}: no image of {sorted(IMAGE_SUFFIXES)} found under it")
    pixels = np.empty((len(paths), side, side, channels), np.uint8)
    numbers = []
    for index, path in enumerate(paths):
        with ImageFile(path, channels) as file:
            whole = to_uint8(file(0, 0, *file.size)[0])
        flat = whole.squeeze(2) if channels == 1 else whole
        square = ImageOps.fit(Image.fromarray(flat), (side, side))
        pixels[index] = np.asarray(square).reshape(side, side, channels)
        parts = path.relative_to(folder).parts
        numbers.append(names.index(parts[0]) if len(parts) > 1 else 0)
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous()
    return Images(channels_first, torch.tensor(numbers), names, pad=False)


def fit(pixels: Tensor, height: int, width: int, pad: bool, mode: str = "bilinear") -> Tensor:
    """uint8 `[B, c, s, s]` -> float32 `[B, c, height, width]` in [-1, 1], undistorted.

    Another aspect ratio is met by padding with -1 on both sides, or by cropping both sides; another
    size by resampling, `mode` being "bilinear" or "bicubic", antialiased.
    """
    x = pixels.float() / 127.5 - 1
    side = min(height, width) if pad else max(height, width)
    if side != x.shape[-1]:
        x = F.interpolate(x, size=(side, side), mode=mode, antialias=True).clamp(-1, 1)
    if pad:
        top, left = (height - side) // 2, (width - side) // 2
        margins = (left, width - side - left, top, height - side - top)
        return F.pad(x, margins, value=-1.0)
    top, left = (side - height) // 2, (side - width) // 2
    return x[..., top : top + height, left : left + width]
