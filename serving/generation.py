"""The body of a request for images, in OpenAI's shape with the runtime's settings beside it.

Source of the shape: OpenAI's API reference, "Images".
"""

from typing import Annotated, Literal

from msgspec import Meta, Struct

from serving.asked import Asked
from serving.encode import Format
from serving.pictures import read_size


class Generation(Struct):
    """The body of a request for images; what other servers take besides is ignored."""

    prompt: str
    model: str | None = None
    n: int | None = None
    size: str | None = None
    response_format: Literal["b64_json", "url"] | None = None
    output_format: Format | None = None
    output_compression: Annotated[int, Meta(ge=1, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, Meta(ge=0, le=100)] | None = None
    seed: int | None = None
    index: int | None = None
    num_inference_steps: int | None = None
    guidance_scale: float | None = None
    latent: str | None = None
    eta: float | None = None
    solver: str | None = None

    def asked(self) -> Asked:
        """By the runtime's names."""
        return Asked(
            self.prompt,
            self.model,
            1 if self.n is None else self.n,
            None if self.size in (None, "auto") else read_size("size", self.size),
            None if self.latent in (None, "auto") else read_size("latent", self.latent),
            self.num_inference_steps,
            self.guidance_scale,
            self.eta,
            self.solver,
            self.seed,
            self.index or 0,
        )
