"""What a decode needs of latents, computed once: any size and crop is drawn from it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from runtime.bundle.arrays import read_arrays, require
from runtime.bundle.files import atomic_write, parsing
from runtime.bundle.interface import Size
from runtime.bundle.manifest import Axis
from runtime.errors import ArtefactError

OWN_KEYS = ("bundle", "latent", "metadata")
WHAT = "decode state"
MOST_MEMBERS = 64
LARGEST_STATE = (1 << 32) - 1  # bytes of a state's file
LONGEST_NAME = 4 * 64  # bytes of a SHA-256 in letters
LARGEST_METADATA = 4 << 20  # bytes of what made the latents, four to a letter
REMEDY = "Make it again with: python -m runtime.generate --state"


@dataclass(frozen=True)
class DecodeState:
    """Of B images, what is drawn from: float32 arrays `[B, ...]` by the names of their tensors.

    With a resampler these are its sums over each latent's tokens, else the pixels themselves.
    `bundle` is the SHA-256 of the fp32 graph that the arrays belong to; `latent` the size and
    `metadata` what made the latents.
    """

    arrays: Mapping[str, NDArray[np.float32]]
    bundle: str
    latent: Size
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def one(self, index: int) -> dict[str, NDArray[np.float32]]:
        """One image's arrays `[1, ...]`, as the graphs take them."""
        return {name: array[index : index + 1] for name, array in self.arrays.items()}

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all; raises ResourceError."""
        own = {
            "bundle": np.array(self.bundle),
            "latent": np.array(self.latent),
            "metadata": np.array(json.dumps(self.metadata)),
        }
        with atomic_write(path) as file:
            np.savez(file, allow_pickle=False, **self.arrays, **own)

    @classmethod
    def load(cls, path: Path) -> "DecodeState":
        """Read what `save` wrote; raises ArtefactError. Nothing in the file is run as code."""
        arrays = read_arrays(path, WHAT, REMEDY, LARGEST_STATE, MOST_MEMBERS)
        bundle, latent, text = (require(path, arrays, key, REMEDY) for key in OWN_KEYS)
        with parsing(path, WHAT, REMEDY):
            if text.nbytes > LARGEST_METADATA:
                raise ValueError(f"metadata of {text.nbytes} bytes")
            metadata = msgspec.json.decode(str(text), type=dict[str, Any])
        sized = latent.shape == (2,) and latent.dtype.kind == "i" and latent.min() > 0
        whole = bundle.ndim == 0 and bundle.dtype.kind == "U" and sized
        whole = whole and bundle.dtype.itemsize <= LONGEST_NAME
        counts = {array.shape[:1] for array in arrays.values()}
        if not whole or len(counts) != 1 or any(a.dtype != np.float32 for a in arrays.values()):
            listed = ", ".join(f"{name} {a.dtype} {a.shape}" for name, a in arrays.items())
            raise ArtefactError(
                f"{path}: holds {listed or 'no array'}; expected float32 arrays of as many images, "
                f"their latents' size and what made them. {REMEDY}"
            )
        return cls(arrays, str(bundle), (int(latent[0]), int(latent[1])), metadata)

    def check(self, bundle: str, axes: Mapping[str, Sequence[Axis]], source: str) -> None:
        """Raise ArtefactError naming `source` for a state of another bundle, or one not whole.

        `axes`: those of each array, of which named ones may have any size.
        """
        if self.bundle != bundle:
            raise ArtefactError(
                f"{source}: made by a bundle with a graph {self.bundle}; this one has {bundle}. "
                "Pass its bundle: --engine"
            )
        for name, wanted in axes.items():
            array = self.arrays.get(name, np.zeros((), np.float32))
            fits = array.ndim == len(wanted) and all(
                isinstance(axis, str) or axis == side
                for axis, side in zip(wanted, array.shape, strict=True)
            )
            if not fits or not len(array) or not np.isfinite(array).all():
                shown = ", ".join(map(str, wanted))
                raise ArtefactError(
                    f"{source}: {name} is {array.shape}; expected finite numbers [{shown}]. "
                    f"{REMEDY}"
                )
