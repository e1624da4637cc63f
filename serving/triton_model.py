"""The model that serving.triton writes into a repository, run by Triton's Python backend.

Arrays pass through DLPack: the backend's own conversion of them knows numpy 1 alone.
"""

import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import triton_python_backend_utils as pb

from runtime import open_bundle
from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array
from runtime.engines import EngineOptions
from runtime.errors import NumericalError, ResourceError, StoppedError, UsageError
from runtime.pipeline.diffuser import Progress
from serving.asked import Asked
from serving.errors import ApiError
from serving.limits import Limits
from serving.pictures import Model, Picture, batches, preview_size, preview_steps
from serving.triton import BUNDLE, OUTPUTS

TYPES = {"UINT8": np.uint8, "INT32": np.int32, "INT64": np.int64}
MOST_PREVIEWS = 100
UNSAID = "this cannot be drawn; the server's log says why. Ask whoever runs it"
log = logging.getLogger("serving")


class TritonPythonModel:
    """One instance: a bundle that stays open; requests are drawn one after the other."""

    def initialize(self, args: dict[str, str]) -> None:
        """Open the bundle of this version, with the options of its configuration."""
        config = json.loads(args["model_config"])
        texts = {key: own["string_value"] for key, own in config["parameters"].items()}
        options = msgspec.json.decode(texts["engine"], type=EngineOptions)
        self.limits = msgspec.json.decode(texts["limits"], type=Limits)
        if args["model_instance_kind"] == "GPU":
            device = {"device_id": args["model_instance_device_id"]}
            options = replace(options, provider_options={**options.provider_options, **device})
        folder = Path(args["model_repository"], args["model_version"], BUNDLE)
        self.model = Model(config["name"], open_bundle(folder, options))
        self.model.open()

    def execute(self, requests: Sequence[Any]) -> None:
        """Answer each request: a response per preview and picture, and always an empty last one."""
        for request in requests:
            sender = request.get_response_sender()
            try:
                self.answer(request, sender)
            except Exception as error:
                sender.send(pb.InferenceResponse(error=told(error)))
            finally:
                sender.send(flags=pb.TRITONSERVER_RESPONSE_COMPLETE_FINAL)

    def answer(self, request: Any, sender: Any) -> None:
        """Draw what a request asks for; raises what keeps it from being drawn."""
        pictures = asked(request).pictures({self.model.name: self.model}, self.limits)
        wanted = given(request, "previews")
        previews = 0 if wanted is None else int(wanted[0])
        if not 0 <= previews <= MOST_PREVIEWS:
            raise UsageError(f"previews is {previews}; expected 0 to {MOST_PREVIEWS}")
        number = 0
        for group in batches(pictures, self.limits.batch):
            self.draw(group, number, previews, sender)
            number += len(group)

    def draw(self, group: Sequence[Picture], first: int, previews: int, sender: Any) -> None:
        """Draw a batch, whose pictures are numbered from `first` on."""

        def on_step(progress: Progress) -> bool:
            wanted = progress.step in preview_steps(progress.steps, previews)
            for number, picture in enumerate(group if wanted else ()):
                size = preview_size(picture)
                pixels = self.model.draw(picture, progress.x0[number : number + 1], size)
                send(sender, picture, first + number, progress.step, preview=pixels)
            return bool(sender.is_cancelled())

        latents = self.model.diffuse(group, on_step)
        stopped: Callable[[], bool] = sender.is_cancelled
        for number, picture in enumerate(group):
            own = picture.settings
            pixels = self.model.draw(picture, latents[number : number + 1], own.image, stopped)
            send(sender, picture, first + number, own.steps, pixels=pixels)


def asked(request: Any) -> Asked:
    """A request by the runtime's names; what it leaves out is the bundle's own choice."""
    labels = given(request, "labels")
    try:
        prompt = None if labels is None else labels.tobytes().decode()
    except UnicodeDecodeError:
        raise UsageError("labels are no UTF-8; expected that of what --label takes") from None
    count, steps, scale, seed, index = (
        None if (own := given(request, name)) is None else own[0].item()
        for name in ("count", "steps", "guidance_scale", "seed", "first_index")
    )
    return Asked(
        prompt,
        count=1 if count is None else count,
        image=size_of(request, "image"),
        latent=size_of(request, "latent"),
        steps=steps,
        guidance_scale=scale,
        seed=seed,
        index=index or 0,
    )


def given(request: Any, name: str) -> Array | None:
    """An input, or None where it is left out."""
    tensor = pb.get_input_tensor_by_name(request, name)
    return None if tensor is None else np.from_dlpack(tensor)


def size_of(request: Any, name: str) -> Size | None:
    """The input of a size, (height, width); raises UsageError."""
    found = given(request, name)
    if found is None:
        return None
    height, width = found.tolist()
    if height < 1 or width < 1:
        raise UsageError(f"{name} is {height}x{width}; expected a height and a width from 1")
    return height, width


def send(sender: Any, picture: Picture, number: int, step: int, **pixels: Any) -> None:
    """One response: a preview or the pixels, uint8 `[h, w, c]`, with what they are of."""
    values = {"number": [number], "step": [step], "seed": [picture.seed], **pixels}
    tensors = [
        pb.Tensor.from_dlpack(name, np.ascontiguousarray(value, TYPES[OUTPUTS[name][0]]))
        for name, value in values.items()
    ]
    sender.send(pb.InferenceResponse(tensors))


def told(error: Exception) -> Any:
    """An error as a client may read it; what may name this machine's files goes to the log."""
    kinds: list[tuple[type[Exception], int]] = [
        (UsageError, pb.TritonError.INVALID_ARG),
        (ApiError, pb.TritonError.INVALID_ARG),
        (StoppedError, pb.TritonError.CANCELLED),
        (ResourceError, pb.TritonError.UNAVAILABLE),
        (NumericalError, pb.TritonError.INTERNAL),
    ]
    for kind, code in kinds:
        if isinstance(error, kind):
            return pb.TritonError(str(error), code)
    log.error("%s", error, exc_info=error)
    return pb.TritonError(
        "this cannot be drawn; the server's log says why", pb.TritonError.INTERNAL
    )
