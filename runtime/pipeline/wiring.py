"""How a bundle's graphs hang together: by the names and axes of their tensors.

The host makes a few tensors; each graph takes what bears the names of its inputs, from the host or
from a graph of a longer lifetime. What a step takes follows from the axes: a leading "steps" is
indexed by the step, a leading "conditions" becomes "conditions", "batch", one row of the distinct
conditions per branch and image.
"""

from runtime.bundle.manifest import (
    FILE_NAME,
    REBUILD,
    Axis,
    GraphSpec,
    Lifetime,
    Manifest,
    TensorSpec,
)
from runtime.errors import ArtefactError

Axes = tuple[Axis, ...]
# The lifetimes that outlive a step, in the order of their runs.
KEPT: tuple[Lifetime, ...] = ("size", "schedule", "prompt")
LATENT, EPS = "latent", "eps"


def host_tensors(manifest: Manifest) -> dict[str, Axes]:
    """What the runtime itself makes for the diffuser's graphs, float32.

    coordinates: see `runtime.coordinates`; alpha_bar and log_snr = ln(alpha_bar / (1 - alpha_bar))
    of every point of the schedule; the distinct conditions, with the weight of each label.
    """
    return {
        "coordinates": ("height", "width", 4),
        "alpha_bar": ("steps",),
        "log_snr": ("steps",),
        "condition": ("conditions", len(manifest.interface.labels)),
    }


def wires(manifest: Manifest) -> dict[str, Axes]:
    """The axes of every tensor that a step may take; raises ArtefactError where they do not fit."""
    known = host_tensors(manifest)
    for name in manifest.of_lifetime(*KEPT):
        spec = manifest.graphs[name]
        for tensor in spec.inputs:
            _check(manifest, spec, tensor, known.get(tensor.name))
        known |= {tensor.name: tensor.axes for tensor in spec.outputs}
    step, interface = manifest.graphs[manifest.step_graph], manifest.interface
    latent: Axes = ("batch", interface.latent_channels, "height", "width")
    for tensor in step.inputs:
        found = latent if tensor.name == LATENT else known.get(tensor.name)
        _check(manifest, step, tensor, found if found is None else in_step(found))
    eps = step.output(EPS)
    given = eps.axes if (eps := step.output(EPS)) else ()
    if not step.takes(LATENT) or given not in ((branch, *latent) for branch in ("conditions", 1)):
        raise _misfit(
            manifest,
            f"{step.file} gives {[(t.name, *t.axes) for t in step.outputs]}; expected it to take "
            f"{LATENT} {latent} and to give {EPS} {('conditions', *latent)}",
        )
    return known


def in_step(axes: Axes) -> Axes:
    """The axes with which a step takes a tensor; see the module."""
    own = axes[1:] if axes[:1] == ("steps",) else axes
    return ("conditions", "batch", *own[1:]) if own[:1] == ("conditions",) else own


def _check(manifest: Manifest, spec: GraphSpec, tensor: TensorSpec, found: Axes | None) -> None:
    if found != tensor.axes:
        there = "nothing before it gives that" if found is None else f"what is given has {found}"
        raise _misfit(manifest, f"{spec.file} takes {tensor.name} {tensor.axes}, but {there}")


def _misfit(manifest: Manifest, what: str) -> ArtefactError:
    return ArtefactError(f"{manifest.folder / FILE_NAME}: {what}. {REBUILD}")
