"""From noise to latents: the graphs of each lifetime run when it begins, the step's in a loop.

Letters: B images, K conditions, C latent channels, H × W latent, S points of the schedule.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array
from runtime.coordinates import grid
from runtime.engines import Engine, SamplingEngine
from runtime.pipeline.opened import Engines
from runtime.pipeline.resampler import Resampler
from runtime.pipeline.uncoded import Uncoded
from runtime.pipeline.wiring import EPS, KEPT, LATENT, wires
from runtime.sampling import ddim, schedule
from runtime.sampling.noise import NoiseStreams, refine
from runtime.sampling.request import Request

# eps enters x0 divided by sqrt(alpha_bar): at 1e-6, where a trajectory starts, its error comes out
# 1000 times as large. bf16 and 8 bits begin where alpha_bar has reached this: with the third of 50
# steps.
EXACT_BELOW = 1e-3
COARSE = ("bf16", "int8", "int8w", "fp8")


@dataclass(frozen=True)
class StepInputs:
    """What a step takes besides its latent: what outlives it, and what it takes of the schedule.

    `fixed` stays as it is. `varying` has a leading axis of points of the schedule; those in
    `gathered` then one of distinct conditions, of which `place` `[K, B]` says which is whose.
    """

    fixed: dict[str, Array]
    varying: dict[str, Array]
    gathered: frozenset[str]
    place: NDArray[np.int64]

    def of_step(self, step: int) -> dict[str, Array]:
        """The inputs that change with the step."""
        return {
            name: gather(value[step], self.place) if name in self.gathered else value[step, ...]
            for name, value in self.varying.items()
        }

    def at(self, step: int) -> dict[str, Array]:
        """All inputs of a step but its latent."""
        return self.fixed | self.of_step(step)


def gather(rows: Array, place: NDArray[np.int64]) -> Array:
    """Rows of distinct conditions `[n, ...]` as each branch and image has them, `[K, B, ...]`."""
    return np.ascontiguousarray(rows[place])


class Diffuser:
    """The graphs of a bundle's denoiser, and the sampler around them."""

    def __init__(self, engines: Engines, resampler: Resampler | Uncoded):
        self.engines, self.resampler = engines, resampler
        self.manifest = engines.manifest
        self.step_graph = self.manifest.step_graph
        self.kept = self.manifest.of_lifetime(*KEPT)
        self.axes = wires(self.manifest)

    @property
    def graphs(self) -> list[str]:
        """Every graph that diffusing needs."""
        return [*self.kept, self.step_graph]

    def exact_steps(self, steps: int) -> int:
        """How many of the first of `steps` run in fp32, whatever the precision; see EXACT_BELOW."""
        if self.engines.options.precision not in COARSE:
            return 0
        return int((schedule.sampling_alpha_bar(steps)[:-1] < EXACT_BELOW).sum())

    def step_engines(self, steps: int) -> tuple[Engine, Engine]:
        """The engines of a step: of the first `exact_steps` and of all others; often one."""
        exact = "fp32" if self.exact_steps(steps) else None
        return self.engines.open(self.step_graph, exact), self.engines.open(self.step_graph)

    def noise(self, request: Request, latent: Size) -> NoiseStreams:
        """The noise of a request's images at a latent size."""
        shape = (self.manifest.interface.latent_channels, *latent)
        return NoiseStreams(request.seed, request.indices, shape, request.noise)

    def diffuse(
        self, request: Request, on_step: Callable[[int], object] | None = None
    ) -> NDArray[np.float32]:
        """The latents `[B, C, H, W]` of a request that was checked."""
        steps, turn, larger = request.steps, request.turn, request.continue_at
        self.step_engines(steps)  # a damaged file shows before any work, not after it
        self.engines.open_all(self.graphs)
        streams = self.noise(request, request.latent)
        x = self.sample(streams.draw(), streams, request, on_step, (0, turn))
        if larger is None:
            return x
        self.engines.open_all(self.resampler.encoding(larger))
        denoise, weights = self.denoiser(request, request.latent)
        part = ddim.sample(denoise, x, steps, weights, first=turn, last=turn)
        streams = self.noise(request, larger)
        x = self.enlarge(part, turn, steps, streams.draw())
        return self.sample(x, streams, request, on_step, (turn, steps))

    def sample(
        self,
        x: Array,
        streams: NoiseStreams,
        request: Request,
        on_step: Callable[[int], object] | None,
        part: tuple[int, int],
    ) -> NDArray[np.float32]:
        """`x` `[B, C, H, W]` after DDIM steps, on the device where it can stay.

        `part`: the first step and the one before which to stop, of `request.steps`.
        """
        (start, stop), steps = part, request.steps
        size = (x.shape[2], x.shape[3])
        first, engine = self.step_engines(steps)
        if isinstance(first, SamplingEngine) and isinstance(engine, SamplingEngine):
            conditions, weights = self.branches(request)
            inputs = self.inputs(conditions, size, schedule.sampling_alpha_bar(steps))
            turn = min(max(self.exact_steps(steps), start), stop)
            for own, span in ((first, (start, turn)), (engine, (turn, stop))):
                updates = self.updates(inputs, weights, streams, request, span)
                if update := next(updates, None):  # None where the span has no step
                    given = {LATENT: x, **inputs.fixed, **update}
                    x = own.sample(given, chain([update], updates), on_step, span[0])
            return x

        def fresh(step: int) -> Array:
            return streams.draw(step + 1)

        denoise, weights = self.denoiser(request, size)
        made = ddim.sample(denoise, x, steps, weights, request.eta, fresh, on_step, *part)
        return np.asarray(made.x, np.float32)

    def branches(self, request: Request) -> tuple[Array, list[NDArray[np.float32]]]:
        """Conditions `[K, B, labels]` and each branch's weight per image; see `Request`."""
        return request.branches(len(self.manifest.interface.labels))

    def denoiser(
        self, request: Request, latent: Size
    ) -> tuple[ddim.Denoiser, list[NDArray[np.float32]]]:
        """eps of a request's steps with all that outlives one computed here, and its weights."""
        conditions, weights = self.branches(request)
        steps = request.steps
        inputs = self.inputs(conditions, latent, schedule.sampling_alpha_bar(steps))
        exact, (first, engine) = self.exact_steps(steps), self.step_engines(steps)

        def denoise(x: Array, step: int) -> Array:
            own = first if step < exact else engine
            return own.run({LATENT: x, **inputs.at(step)})[EPS]

        return denoise, weights

    def denoise(self, latent: Array, alpha_bar: float, conditions: Array) -> NDArray[np.float32]:
        """One evaluation: latent `[B, C, H, W]`, conditions `[K, B, labels]` -> eps `[K, B, ...]`.

        See `Bundle.denoise`.
        """
        size = (latent.shape[2], latent.shape[3])
        inputs = self.inputs(conditions, size, np.array([alpha_bar]))
        return self.engines.open(self.step_graph).run({LATENT: latent, **inputs.at(0)})[EPS]

    def enlarge(self, part: ddim.Sample, step: int, steps: int, noise: Array) -> Array:
        """x of `step` at the larger size of `noise` `[B, C, H, W]`, from a sample at that step.

        x = sqrt(a) · x0 + sqrt(1 - a) · eps there as here: the resampler enlarges the estimate of
        x0, and the estimate of eps becomes the coarse part of `noise`, so that the variance stays
        1 - a.
        """
        height, width = noise.shape[2:]
        a = float(schedule.sampling_alpha_bar(steps)[step])
        x0 = self.resampler.enlarge(part.x0, (height, width))
        eps = refine(ddim.predict_eps(part.x, part.x0, a), noise)
        return np.asarray(x0 * math.sqrt(a) + eps * math.sqrt(1 - a), np.float32)

    def inputs(self, conditions: Array, latent: Size, alpha_bar: NDArray[np.float64]) -> StepInputs:
        """What outlives a step, computed: conditions `[K, B, labels]`, alpha_bar `[S]`."""
        count, batch, labels = conditions.shape
        unique, place = np.unique(conditions.reshape(-1, labels), axis=0, return_inverse=True)
        place = place.reshape(count, batch)
        known: dict[str, Array] = {
            "coordinates": grid(*latent),
            "alpha_bar": alpha_bar.astype(np.float32),
            "log_snr": log_snr(alpha_bar),
            "condition": unique,
        }
        for name in self.kept:
            spec = self.manifest.graphs[name]
            given = {tensor.name: known[tensor.name] for tensor in spec.inputs}
            known |= self.engines.open(name).run(given)
        fixed: dict[str, Array] = {}
        varying: dict[str, Array] = {}
        gathered = set()
        for tensor in self.manifest.graphs[self.step_graph].inputs:
            if tensor.name == LATENT:
                continue
            value, axes = known[tensor.name], self.axes[tensor.name]
            if axes[:1] == ("steps",):
                varying[tensor.name] = value
                if axes[1:2] == ("conditions",):
                    gathered.add(tensor.name)
            else:
                fixed[tensor.name] = gather(value, place) if axes[:1] == ("conditions",) else value
        return StepInputs(fixed, varying, frozenset(gathered), place)

    def updates(
        self,
        inputs: StepInputs,
        weights: Sequence[NDArray[np.float32]],
        noise: NoiseStreams,
        request: Request,
        part: tuple[int, int],
    ) -> Iterator[dict[str, Array]]:
        """What changes per step of `part` for a `SamplingEngine`; `noise` where it has changed."""
        first, last = part
        alpha_bars = [float(a) for a in schedule.sampling_alpha_bar(request.steps)]
        for step, (a, a_next) in enumerate(pairwise(alpha_bars[first : last + 1]), first):
            keep, move, spread = ddim.step_weights(a, a_next, request.eta)
            update = inputs.of_step(step) | {
                "keep": np.array([keep], np.float32),
                "weights": np.stack(weights) * np.float32(move),
            }
            if spread > 0:
                update["noise"] = noise.draw(step + 1) * np.float32(spread)
            elif step == first:
                update["noise"] = np.zeros((len(noise.indices), *noise.shape), np.float32)
            yield update


def log_snr(alpha_bar: NDArray[np.float64]) -> NDArray[np.float32]:
    """ln(alpha_bar / (1 - alpha_bar)), which float32 alpha_bar near 1 would have lost."""
    with np.errstate(divide="ignore"):  # infinite where there is no noise
        return (np.log(alpha_bar) - np.log1p(-alpha_bar)).astype(np.float32)
