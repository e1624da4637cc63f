"""What a request of any shape comes to: pictures of a model that is loaded, within the limits."""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass

from runtime.bundle.interface import Size
from runtime.errors import UsageError
from runtime.sampling.choices import SOLVER, SOLVERS
from runtime.sampling.labels import Label
from serving.edits import Edit
from serving.errors import ApiError
from serving.limits import Limits
from serving.pictures import Model, Picture, Settings

SEEDS = 1 << 32  # among which one is drawn by lot; every client's numbers hold it


@dataclass(frozen=True)
class Asked:
    """A request by the runtime's names, None where it leaves the choice; `count` is per label.

    Sizes are (height, width); `prompt` is read as `--label` is, "" and None as no condition. The
    first picture has the noise of (`seed`, `index`), the next one that of the next index.
    """

    prompt: str | None
    model: str | None = None
    count: int = 1
    image: Size | None = None
    latent: Size | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    eta: float | None = None
    solver: str | None = None
    seed: int | None = None
    index: int = 0
    edit: Edit | None = None

    def pictures(self, models: Mapping[str, Model], limits: Limits) -> list[Picture]:
        """Every picture, in the order of labels, checked; raises ApiError and UsageError."""
        model = self.chosen(models)
        prompt = (self.prompt or "").strip()
        labels = model.labels.listed(prompt) if prompt else [None]
        if self.count < 1:
            raise UsageError(f"n is {self.count}; expected a number of pictures from 1")
        settings = self.settings(model)
        count = len(labels) * self.count
        limits.check(count, settings.image, settings.latent, settings.steps)
        seed = secrets.randbelow(SEEDS) if self.seed is None else self.seed
        each: list[Label] = [label for label in labels for _ in range(self.count)]
        pictures = [
            Picture(model, settings, label, seed, index)
            for index, label in enumerate(each, self.index)
        ]
        for picture in {str(picture.label): picture for picture in pictures}.values():
            model.check(picture)
        return pictures

    def chosen(self, models: Mapping[str, Model]) -> Model:
        """The model that is asked for, the first one where none is; raises ApiError."""
        if self.model is None:
            return next(iter(models.values()))
        if self.model not in models:
            raise ApiError(
                404,
                "model_not_found",
                f"no model {self.model!r}; expected {' or '.join(models)}, or none for the first",
            )
        return models[self.model]

    def settings(self, model: Model) -> Settings:
        """What the pictures share, with the bundle's own sizes where none are asked for."""
        interface, image, latent = model.interface, self.image, self.latent
        init = None if self.edit is None else self.edit.pixels["init"]
        if init is not None and image is None and interface.decoupled:
            image = init.shape[2], init.shape[3]
        if latent is None:
            latent = (
                interface.latent_of_picture(image) if image else model.bundle.default_latent(init)
            )
        solver = SOLVER if self.solver is None else self.solver
        if solver not in SOLVERS:
            raise UsageError(f"solver is {solver!r}; expected {' or '.join(SOLVERS)}")
        return Settings(
            latent,
            image or interface.image_size(latent),
            SOLVERS[solver].steps if self.steps is None else self.steps,
            interface.guidance_scale if self.guidance_scale is None else self.guidance_scale,
            0.0 if self.eta is None else self.eta,
            solver,
            edit=self.edit,
        )
