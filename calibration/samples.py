"""Real inputs of every heavy graph: what the shipped numbers go through, not random ones.

Pictures are drawn once; latents of any size are encoded from them, so they are in [-1, 1] however
well the checkpoint draws, and the step graph sees them on their way from noise, at several
alpha_bar.
"""

from collections.abc import Mapping

import numpy as np

from runtime import schedule
from runtime.coordinates import grid
from runtime.manifest import Array, Manifest
from runtime.pipeline import Pipeline
from runtime.tiles import Size

PICTURES = 3
DRAWING_STEPS = 20
# Step k of these is where the k-th sample (modulo their count) of the step graph is taken:
# alpha_bar 1e-6, 0.14, 0.49, 0.85 and 1.
TRAJECTORY_STEPS = 4

Arrays = dict[str, Array]


class Samples:
    """Inputs of a bundle's heavy graphs, and the fp32 graphs' own outputs for them."""

    def __init__(self, manifest: Manifest):
        self.pipeline = Pipeline(manifest)
        labels = [i % manifest.model.condition.labels for i in range(PICTURES)]
        self.pictures = self.pipeline.generate(labels, steps=DRAWING_STEPS).images
        self.latents = self.pipeline.encode(self.pictures, manifest.model.default_latent)

    def take(self, graph: str, sizes: Mapping[str, int], number: int) -> tuple[Arrays, Arrays]:
        """Inputs and fp32 outputs of `graph` at `sizes` of its named axes.

        `sizes` has height and width (the graph's own grid), batch up to 3, and for the step
        graph conditions. `number` chooses its alpha_bar and noise.
        """
        inputs = self._inputs(graph, sizes, number)
        return inputs, self.pipeline.engine(graph).run(inputs)

    def _inputs(self, graph: str, sizes: Mapping[str, int], number: int) -> Arrays:
        size, batch = (sizes["height"], sizes["width"]), sizes["batch"]
        pictures, latents = self.pictures[:batch], self.latents[:batch]
        if graph == "r2id":
            latents = self.pipeline.encode(pictures, size)
            return self._step(latents, sizes["conditions"], size, number)
        at = {"coordinates": grid(*size)}
        if graph == "r2ir_image_summary":
            return {"pixels": self.pipeline.decode(latents, size), **at}
        if graph == "r2ir_encode":
            return self._sums("r2ir_image_summary", "pixels", pictures) | at
        if graph == "r2ir_latent_summary":
            return {"latent": self.pipeline.encode(pictures, size), **at}
        inputs = self._sums("r2ir_latent_summary", "latent", latents) | at
        if graph == "r2ir_render":  # draws again what r2ir_decode draws, given its ratios
            inputs["response"] = self.pipeline.engine("r2ir_decode").run(inputs)["response"]
        return inputs

    def _sums(self, graph: str, name: str, values: Array) -> Arrays:
        """The sums over the tokens of `values`, as the other graphs take them."""
        at = grid(values.shape[2], values.shape[3])
        return self.pipeline.engine(graph).run({name: values, "coordinates": at})

    def _step(self, latent: Array, conditions: int, size: Size, number: int) -> Arrays:
        """Inputs of the step graph on its way from noise to `latent` `[B, C, H, W]`."""
        batch, labels = len(latent), self.pipeline.model.condition.labels
        one_hot = np.zeros((conditions, batch, labels), np.float32)
        for branch in range(1, conditions):  # branch 0 is the null condition
            one_hot[branch, range(batch), (np.arange(batch) + branch) % labels] = 1
        alpha_bars = schedule.sampling_alpha_bar(TRAJECTORY_STEPS)
        step = number % len(alpha_bars)
        noise = np.random.default_rng(number).standard_normal(latent.shape)
        x = np.sqrt(alpha_bars[step]) * latent + np.sqrt(1 - alpha_bars[step]) * noise
        inputs, film = self.pipeline.step_inputs(one_hot, size, TRAJECTORY_STEPS)
        return {"latent": x.astype(np.float32), "film": film[step], **inputs}
