"""What a decode needs of a latent, computed once: any size and crop is drawn from it."""

import json
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.files import atomic_write, open_file
from runtime.errors import ArtefactError

KEYS = ("bundle", "k", "kv", "metadata")
LARGEST_STATE = 1 << 32  # bytes of a state's file, unpacked
REMEDY = "Make it again with: python -m runtime.generate --state"


@dataclass(frozen=True)
class DecodeState:
    """The sums over a latent's tokens, of B images, float32: kv `[B, L, d, d]` and k `[B, L, d]`.

    `bundle` is the SHA-256 of the bundle's fp32 `r2ir_render`, the graph that reads the sums;
    `metadata` is what made the latents.
    """

    kv: NDArray[np.float32]
    k: NDArray[np.float32]
    bundle: str
    metadata: dict[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.k)

    def sums(self, index: int) -> dict[str, NDArray[np.float32]]:
        """One image's sums as the graphs take them."""
        return {"kv": self.kv[index : index + 1], "k": self.k[index : index + 1]}

    def save(self, path: Path) -> None:
        """Write an .npz file, whole or not at all; raises ResourceError."""
        text = np.array(json.dumps(self.metadata))
        with atomic_write(path) as file:
            np.savez(file, kv=self.kv, k=self.k, bundle=np.array(self.bundle), metadata=text)

    @classmethod
    def load(cls, path: Path) -> "DecodeState":
        """Read what `save` wrote; raises ArtefactError. Nothing in the file is run as code."""
        try:
            with open_file(path, "a decode state", REMEDY) as file:
                check_archive(path, zipfile.ZipFile(file))
                with np.load(file, allow_pickle=False) as found:
                    kv, k, bundle, text = (found[key] for key in ("kv", "k", "bundle", "metadata"))
            metadata = json.loads(str(text))
        except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
            if isinstance(error, ArtefactError):
                raise
            raise ArtefactError(f"{path}: no decode state ({error}). {REMEDY}") from None
        whole = isinstance(metadata, dict) and bundle.ndim == 0 and bundle.dtype.kind == "U"
        shapes = kv.shape[:3] == k.shape and kv.shape[2:3] == kv.shape[3:] and k.ndim == 3
        if not whole or not shapes or kv.dtype != np.float32 or k.dtype != np.float32:
            raise ArtefactError(
                f"{path}: kv is {kv.dtype} {kv.shape}, k is {k.dtype} {k.shape}; expected float32 "
                f"[B, L, d, d] and [B, L, d]. {REMEDY}"
            )
        return cls(kv, k, str(bundle), metadata)

    def check(self, bundle: str, blocks: int, width: int, source: str) -> None:
        """Raise ArtefactError naming `source` for a state of another bundle, or one not whole."""
        if self.bundle != bundle:
            raise ArtefactError(
                f"{source}: made by a bundle with r2ir_render {self.bundle}; this one has "
                f"{bundle}. Pass its bundle: --engine"
            )
        finite = np.isfinite(self.k).all() and np.isfinite(self.kv).all()
        if self.k.shape[1:] != (blocks, width) or not len(self) or not finite:
            raise ArtefactError(
                f"{source}: k is {self.k.shape}; expected finite sums [B, {blocks}, {width}]. "
                f"{REMEDY}"
            )


def check_archive(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise ArtefactError for members other than a state's, or larger than any state."""
    members = {info.filename.removesuffix(".npy"): info.file_size for info in archive.infolist()}
    if sorted(members) != sorted(KEYS) or sum(members.values()) > LARGEST_STATE:
        raise ArtefactError(
            f"{path}: holds {members}; expected {list(KEYS)} of {LARGEST_STATE} bytes at most. "
            f"{REMEDY}"
        )
