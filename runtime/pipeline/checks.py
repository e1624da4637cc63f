"""What a bundle cannot draw is refused before any engine is opened."""

from runtime.bundle.interface import Size
from runtime.pipeline.diffuser import Diffuser, distinct
from runtime.sampling.request import Request


def check_request(diffuser: Diffuser, request: Request, batch: int | None = None) -> None:
    """Raise UsageError for a request that the bundle cannot meet.

    `batch`: images drawn at once, where not all of them are.
    """
    manifest, resampler = diffuser.manifest, diffuser.resampler
    interface = manifest.interface
    request.check(interface.labels)
    interface.latent_sides.check(request.latent, "latent")
    if request.continue_at is not None:
        interface.latent_sides.check(request.continue_at, "continue-at")
    image = request.image or interface.image_size(request.largest)
    interface.check_image(request.largest, image)
    images = min(len(request.labels), batch or len(request.labels))
    for size in dict.fromkeys((request.latent, request.largest)):
        check_steps(diffuser, request, size, images)
    resampler.check_state(request.largest)
    resampler.check_draw(image)
    if request.continue_at is not None:
        resampler.check_enlarge(request.latent, request.continue_at, images)


def check_steps(diffuser: Diffuser, request: Request, latent: Size, images: int) -> None:
    """Raise UsageError where a graph of the diffuser cannot run a request at a latent size."""
    guidance = diffuser.guidance(request, table := request.table(diffuser.schedule))
    rows, _ = distinct(guidance.conditions)
    counts = {len(guidance.branches(step)) for step in range(len(table))}
    sizes = {"height": latent[0], "width": latent[1], "batch": images}
    sizes["steps"] = len(table.alpha_bar)
    forms = {diffuser.engines.options.form}
    if diffuser.exact_steps(table):
        forms.add("fp32")
    for form in forms:  # each has a plan, and profiles, of its own
        for count in counts:
            own = sizes | {"conditions": count}
            diffuser.engines.check(diffuser.step_graph, own, form)
    for name in diffuser.kept:
        diffuser.engines.check(name, sizes | {"conditions": len(rows)})
