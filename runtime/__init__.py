"""Torch-free runtime: numpy around the engines of a bundle.

    from runtime import open_bundle

    bundle = open_bundle("build/mnist")          # a folder, or an engine file in it
    made = bundle.generate([7, None], latent=(8, 8), image=(64, 64), seed=1)

Sizes are (height, width); B images, K conditions, C latent channels, c colours.

- `open_bundle(engine, options, expect_sha256)` -> `Bundle`.
- `Bundle.generate(labels, latent, image, ...)` -> `Generated`: `images` float32 `[B, c, h, w]` in
  [-1, 1] and `latents` float32 `[B, C, H, W]`; shows itself in a notebook. With `init`, `strength`
  and `mask` it edits a picture.
- `Bundle.encode(pixels, size)`, `decode(latent, size, crop)` and `resample(pixels, size)` take
  images to latents, back, and to another size: float32 `[B, c, h, w]` and `[B, C, H, W]`.
- `Bundle.state(latent)` keeps what `render(state, size, crop, index=i)` draws any size from.
- `Bundle.denoise(latent, alpha_bar, conditions)` -> eps `[K, B, C, H, W]`: one evaluation.
- `Bundle.interface`: names of labels, channels, legal sizes, defaults.

Errors are those of `runtime.errors`. Several threads may use one bundle. `docs/python.md` has an
example of each.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runtime.engines import EngineOptions
    from runtime.pipeline.bundle import Bundle, Generated, open_bundle

__all__ = ["Bundle", "EngineOptions", "Generated", "open_bundle"]


def __getattr__(name: str) -> Any:
    """Import the rest when it is first asked for, so that `--help` stays quick."""
    if name in __all__:
        from runtime.pipeline import bundle

        return getattr(bundle, name)
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
