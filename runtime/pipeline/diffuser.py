"""From noise to latents: the graphs of each lifetime run when it begins, the step's in a loop.

Letters: B images, K conditions, C latent channels, H × W latent, S points of the schedule.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import groupby

import numpy as np
from numpy.typing import NDArray

from runtime.bundle.interface import Size
from runtime.bundle.manifest import Array
from runtime.coordinates import grid
from runtime.engines import HISTORY, Engine, SamplingEngine
from runtime.errors import StoppedError
from runtime.pipeline.coder import Coder
from runtime.pipeline.editing import Editor
from runtime.pipeline.inputs import StepInputs, distinct, gather
from runtime.pipeline.opened import Engines
from runtime.pipeline.wiring import EPS, KEPT, LATENT, wires
from runtime.sampling import schedule, solvers
from runtime.sampling.guidance import Guidance, guide
from runtime.sampling.loop import Hold, Predictor, StepCallback, require_finite, sample
from runtime.sampling.noise import NoiseStreams, refine
from runtime.sampling.request import Request
from runtime.sampling.solvers import Table

# eps enters x0 divided by sqrt(alpha_bar): at 1e-6, where a trajectory starts, its error comes out
# 1000 times as large. bf16 and 8 bits begin after the first step, once alpha_bar has reached this:
# with the third of 12 steps. In int8 and bf16 that is worth 6 dB of the picture.
EXACT_BELOW = 1e-3
COARSE = ("bf16", "int8", "int8w", "fp8")
MOST_KEPT = 64 << 20  # bytes of one graph's inputs and outputs that are kept from run to run
LARGEST_LOG_SNR = 80.0  # in place of infinity, where there is no noise


@dataclass(frozen=True)
class Progress:
    """What `on_step` gets: the number of steps done, of how many, and what they have come to.

    `on_step` stops the run by returning True, as tqdm's `update` does: do not hand that on.
    """

    step: int
    steps: int
    _estimate: Callable[[], Array]
    _decode: Callable[[Array, Size | None], Array]

    @cached_property
    def x0(self) -> NDArray[np.float32]:
        """The step's estimate of the clean latents, float32 `[B, C, H, W]`; computed if asked."""
        return np.asarray(self._estimate(), np.float32)

    def decode(self, size: Size | None = None) -> NDArray[np.float32]:
        """`x0` as images float32 `[B, c, h, w]` in [-1, 1], by default of the request's size.

        What an edit keeps of its picture is put back.
        """
        return self._decode(self.x0, size)


OnStep = Callable[[Progress], object]


class Diffuser:
    """The graphs of a bundle's denoiser, and the sampler around them."""

    def __init__(self, engines: Engines, resampler: Coder):
        self.engines, self.resampler = engines, resampler
        self.manifest = engines.manifest
        self.editor = Editor(self.manifest.interface, resampler)
        self.schedule = self.manifest.schedule
        self.step_graph = self.manifest.step_graph
        self.kept = self.manifest.of_lifetime(*KEPT)
        self.axes = wires(self.manifest)
        # Replaced whole, so that threads need no lock.
        self._last: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}

    def exact_steps(self, table: Table) -> int:
        """How many of the first steps run in fp32, whatever the precision; see EXACT_BELOW."""
        if self.engines.options.precision not in COARSE:
            return 0
        return max(1, int((table.alpha_bar[:-1] < EXACT_BELOW).sum()))

    def opening(
        self, requests: Sequence[Request], drawing: Iterable[str] = ()
    ) -> contextlib.AbstractContextManager[None]:
        """All graphs of requests, and those of `drawing`, opened while the block runs."""
        tables = [request.table(self.schedule) for request in requests]
        exact = any(len(table) and self.exact_steps(table) for table in tables)
        step = [self.step_graph, *self.kept] if any(map(len, tables)) else []
        encoded = [request.continue_at for request in requests if request.continue_at]
        encoded += [request.latent for request in requests if request.begins_with_picture]
        encoding = [graph for size in encoded for graph in self.resampler.encoding(size)]
        return self.engines.opening([*step, *encoding, *drawing], [self.step_graph] * exact)

    def step_engines(self, table: Table) -> tuple[Engine, Engine]:
        """The engines of a step: of the first `exact_steps` and of all others; often one."""
        exact = "fp32" if self.exact_steps(table) else None
        return self.engines.open(self.step_graph, exact), self.engines.open(self.step_graph)

    def noise(self, request: Request, latent: Size) -> NoiseStreams:
        """The noise of a request's images at a latent size."""
        shape = (self.manifest.interface.latent_channels, *latent)
        seeds, indices = zip(*request.noise_keys, strict=True)
        return NoiseStreams(seeds, indices, shape, request.noise)

    def guidance(self, request: Request, table: Table) -> Guidance:
        """The conditions of a request and their weights in each step of its table."""
        return request.guidance(table, self.schedule, self.manifest.interface)

    def diffuse(self, request: Request, on_step: OnStep | None = None) -> NDArray[np.float32]:
        """The latents `[B, C, H, W]` of a request that was checked; raises StoppedError."""
        table, turn, larger = request.table(self.schedule), request.turn, request.continue_at
        with self.opening([request]):
            pass  # a damaged file shows before any work, not after it
        told = self.telling(request, len(table), on_step)
        streams = self.noise(request, request.latent)
        x, hold = self.editor.begin(request, streams.draw(), table.alpha_bar)
        if not len(table):
            return x
        guidance, part = self.guidance(request, table), (0, min(turn, len(table)))
        x = self.sample(x, streams, table, guidance, told, part, hold)
        if larger is None:
            return x
        eps = self.predictor(guidance, request.latent, table)(x, turn)
        streams = self.noise(request, larger)
        x = self.enlarge(x, eps, float(table.alpha_bar[turn]), streams.draw())
        return self.sample(x, streams, table, guidance, told, (turn, len(table)))

    def telling(self, request: Request, steps: int, on_step: OnStep | None) -> StepCallback | None:
        """What a loop calls after a step: tells `on_step`, and raises StoppedError on its word."""
        if on_step is None:
            return None

        interface, kept = self.manifest.interface, cache(partial(self.editor.kept, request))

        def decode(x0: Array, size: Size | None) -> Array:
            if size is None and request.image is None and request.init is None:
                size = interface.image_size((x0.shape[2], x0.shape[3]))
            images = self.resampler.decode(x0, size := size or request.drawn_size(interface))
            own = kept(size)
            return images if own is None else own.paste(images)

        def tell(step: int, estimate: Callable[[], Array]) -> None:
            if on_step(Progress(step + 1, steps, estimate, decode)) is True:
                raise StoppedError(f"stopped after step {step + 1} of {steps}")

        return tell

    def sample(
        self,
        x: Array,
        streams: NoiseStreams,
        table: Table,
        guidance: Guidance,
        on_step: StepCallback | None,
        part: tuple[int, int],
        hold: Hold | None = None,
    ) -> NDArray[np.float32]:
        """`x` `[B, C, H, W]` after steps of a table, on the device where it can stay.

        `part`: the first step and the one before which to stop. For `hold` it comes back after
        each.
        """
        size = (x.shape[2], x.shape[3])

        def fresh(step: int) -> Array:
            return streams.draw(step + 1)

        engines = self.step_engines(table)
        if not all(isinstance(engine, SamplingEngine) for engine in engines):
            predict = self.predictor(guidance, size, table)
            made = sample(predict, x, table, fresh, on_step, *part, hold)
            return np.asarray(made, np.float32)
        exact = self.exact_steps(table)
        inputs = self.inputs(guidance.conditions, size, table.alpha_bar)
        state = {LATENT: x} | {name: np.zeros_like(x) for name in (*HISTORY, "noise")}

        def kind(step: int) -> tuple[bool, tuple[int, ...], int]:
            """An engine, some of the conditions, and where x comes back a step of its own."""
            return step >= exact, guidance.branches(step), 0 if hold is None else step

        for (later, branches, _), group in groupby(range(*part), kind):
            steps = list(group)
            engine = engines[later]
            assert isinstance(engine, SamplingEngine)
            updates = (self.update(inputs, table, guidance, fresh, step) for step in steps)
            state |= engine.sample({**state, **inputs.kept(branches)}, updates, on_step, steps[0])
            if hold is not None:
                state[LATENT] = hold(state[LATENT], steps[-1] + 1)
        return state[LATENT]

    def predictor(self, guidance: Guidance, latent: Size, table: Table) -> Predictor:
        """Guided eps of a table's steps with all that outlives one computed here."""
        inputs = self.inputs(guidance.conditions, latent, table.alpha_bar)
        exact, (first, engine) = self.exact_steps(table), self.step_engines(table)

        def predict(x: Array, step: int) -> Array:
            own = first if step < exact else engine
            given = inputs.at(step, guidance.branches(step))
            eps = own.run({LATENT: x, **given})[EPS]
            return np.asarray(guide(eps, guidance.at(step)))

        return predict

    def denoise(self, latent: Array, alpha_bar: float, conditions: Array) -> NDArray[np.float32]:
        """One evaluation: latent `[B, C, H, W]`, conditions `[K, B, labels]` -> eps `[K, B, ...]`.

        See `Bundle.denoise`.
        """
        size = (latent.shape[2], latent.shape[3])
        inputs = self.inputs(conditions, size, np.array([alpha_bar]))
        eps = self.engines.open(self.step_graph).run({LATENT: latent, **inputs.at(0)})[EPS]
        require_finite(eps, f"alpha_bar {alpha_bar:g}", EPS)
        return eps

    def enlarge(self, x: Array, eps: Array, alpha_bar: float, noise: Array) -> Array:
        """x at the larger size of `noise` `[B, C, H, W]`, from x and its eps where both are small.

        x = sqrt(a) · x0 + sqrt(1 - a) · eps there as here: the resampler enlarges the estimate of
        x0, and that of eps becomes the coarse part of `noise`, so that the variance stays 1 - a.
        """
        height, width = noise.shape[2:]
        x0 = solvers.predict_x0(x, eps, alpha_bar)
        eps = refine(solvers.predict_eps(x, x0, alpha_bar), noise)
        x0 = self.resampler.enlarge(x0, (height, width))
        larger = x0 * math.sqrt(alpha_bar) + eps * math.sqrt(1 - alpha_bar)
        return np.asarray(larger, np.float32)

    def prepare(self, request: Request, latent: Size) -> StepInputs:
        """What outlives a step of a request at a latent size, computed."""
        table = request.table(self.schedule)
        return self.inputs(self.guidance(request, table).conditions, latent, table.alpha_bar)

    def inputs(self, conditions: Array, latent: Size, alpha_bar: NDArray[np.float64]) -> StepInputs:
        """What outlives a step, computed: conditions `[K, B, labels]`, alpha_bar `[S]`."""
        unique, place = distinct(conditions)
        log_snr = np.clip(schedule.log_snr(alpha_bar), -LARGEST_LOG_SNR, LARGEST_LOG_SNR)
        known: dict[str, Array] = {
            "coordinates": grid(*latent),
            "alpha_bar": alpha_bar.astype(np.float32),
            "log_snr": log_snr.astype(np.float32),
            "condition": unique,
        }
        for name in self.kept:
            given = {
                tensor.name: known[tensor.name] for tensor in self.manifest.graphs[name].inputs
            }
            known |= self.outliving(name, given)
        fixed: dict[str, Array] = {}
        varying: dict[str, Array] = {}
        branched, gathered = set(), set()
        for tensor in self.manifest.graphs[self.step_graph].inputs:
            name = tensor.name
            if name == LATENT:
                continue
            value, axes = known[name], self.axes[name]
            if axes[:1] == ("steps",):
                varying[name] = value
                if axes[1:2] == ("conditions",):
                    gathered.add(name)
            elif axes[:1] == ("conditions",):
                fixed[name] = gather(value, place)
                branched.add(name)
            else:
                fixed[name] = value
        for value in fixed.values():
            value.flags.writeable = False  # so that an engine may keep its copy on a device
        return StepInputs(fixed, frozenset(branched), varying, frozenset(gathered), place)

    def outliving(self, graph: str, given: dict[str, Array]) -> dict[str, Array]:
        """What a graph gives: run where an input is not as it was in the run before, else kept."""
        last = self._last.get(graph)
        if last is not None and all(np.array_equal(last[0][k], v) for k, v in given.items()):
            return last[1]
        made = self.engines.open(graph).run(given)
        if sum(array.nbytes for array in (*given.values(), *made.values())) <= MOST_KEPT:
            self._last[graph] = given, made
        return made

    def update(
        self,
        inputs: StepInputs,
        table: Table,
        guidance: Guidance,
        noise: Callable[[int], Array],
        step: int,
    ) -> dict[str, Array]:
        """What changes in a step for a `SamplingEngine`; `noise` where it is used."""
        row = *table.update(step), *map(float, table.rows[step, :2])
        update = inputs.of_step(step, guidance.branches(step)) | {
            "row": np.array(row, np.float32),
            "weights": np.stack(guidance.at(step)),
        }
        if table.rows[step, 6] > 0:
            update["noise"] = noise(step)
        return update
