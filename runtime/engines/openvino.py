"""OpenVINO on the CPU: a bundle's fp32 graphs, their step in bf16 on request.

It runs the plain graphs: its ONNX reader takes no Scan whose body reads values from outside, as
the FFNs of the step do in the form for processors.
"""

import contextlib
import functools
import json
import math
import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from runtime.bundle.files import sha256
from runtime.bundle.interface import Size
from runtime.bundle.manifest import REBUILD, Array, GraphSpec
from runtime.engines import EngineOptions, kernels
from runtime.engines.onnx_file import check_interface, check_self_contained
from runtime.errors import ArtefactError, IncompatibleError, NumericalError
from runtime.memory import is_out_of_memory, memory, memory_error
from runtime.providers import PROVIDERS

DEVICE = "CPU"
# The step alone runs in bf16: all others run once per image, position and size, and those that
# make pixels hold the Fourier features of coordinates, which have no meaning in bf16. The step also
# runs many times at one size. Compiled for that one, OpenVINO joins its passes over tokens, and a
# step takes 0.6 (of few tokens) to 0.75 of the time, but compiling takes as long as 95 steps of
# 8x8 latents and 11 of 32x32. Forms differ in their last bits, so the request alone decides: steps
# of so many tokens, over all images and conditions, and those at the bundle's default size have a
# form of their own. The latest are kept.
OWN_TOKENS, OWN_FORMS = 2048, 4
# What OpenVINO keeps of the sizes that a graph for all of them has met, per graph and in oneDNN:
# thousands of kernels, if not told otherwise.
KEPT_KERNELS = {"CPU_RUNTIME_CACHE_CAPACITY": "16"}
KEPT_PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64"}
# No run takes so many times what goes in and comes out of it, and so many bytes more.
SPARE_TIMES, SPARE = 200, 1 << 29
MARK = 0x7FC0DEAD
Shape = tuple[int, ...]


def load_library() -> Any:
    """Import openvino; raises IncompatibleError with the command that installs it.

    Raises ResourceError where there is no memory for it.
    """
    try:
        import openvino
    except ImportError as error:
        if is_out_of_memory(error):
            raise memory_error(error, "openvino cannot be imported: ") from None
        raise IncompatibleError(
            f"openvino cannot be imported ({error}); expected it for --provider openvino. "
            f"Install it with: {PROVIDERS['openvino'].install}, or choose --provider cpu or "
            "--allow-fallback"
        ) from None
    return openvino


@functools.cache
def load_core() -> Any:
    """The process's one device list; raises IncompatibleError where it has no CPU."""
    for name, value in KEPT_PRIMITIVES.items():  # oneDNN asks the environment alone, and once
        os.environ.setdefault(name, value)
    library = load_library()
    core = library.Core()
    if DEVICE not in core.available_devices:
        raise IncompatibleError(
            f"openvino {library.__version__} finds {core.available_devices}; expected {DEVICE}. "
            "Choose --provider cpu or --allow-fallback"
        )
    return core


class OpenVinoEngine:
    """One graph compiled by OpenVINO; every thread has an infer request of its own.

    `usual`: the latent size whose steps have a form of their own, however few their tokens are.
    Raises ArtefactError for a graph that is none or reaches outside its file, IncompatibleError
    for a missing library, a refused property, or bf16 on a CPU without it, ResourceError.
    """

    provider = "openvino"

    def __init__(
        self, spec: GraphSpec, model: bytes, options: EngineOptions, usual: Size | None = None
    ):
        check_self_contained(model, spec.file)
        self.spec, self.usual = spec, usual
        self.properties = properties(spec, options)
        try:
            self.graph = load_core().read_model(model)
            spell_out_broadcasts(self.graph)
            reduce_tokens(self.graph)
        except Exception as error:  # RuntimeError for everything, from a C++ library
            raise ArtefactError(f"{spec.file}: {_refusal(error)}. {REBUILD}") from None
        check_interface(spec, shapes_of(self.graph.inputs), shapes_of(self.graph.outputs))
        self._check_shapes()
        self.compiled: dict[tuple[Shape, ...], Any] = {}  # the one used last at the end
        self.broken: str | None = None  # why the graph is not run again
        self._compiling = threading.Lock()
        self._threads = threading.local()
        if spec.lifetime == "step":
            self._compile(_nothing())  # shows a property that is refused
        else:
            self._native(())

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str] | None = None
    ) -> dict[str, Array]:
        """Run the graph on inputs that fit its spec; see `Engine.run`."""
        sizes = self.spec.check_inputs(inputs)
        if self.broken is not None:
            raise ArtefactError(self.broken)
        own = self.spec.lifetime == "step" and self._has_own_form(sizes)
        shapes = tuple(inputs[t.name].shape for t in self.spec.inputs) if own else ()
        native = self._native(shapes)
        try:
            request = self._request(native)
            for tensor in self.spec.outputs:
                mark(request.get_tensor(tensor.name).data)
            found = request.infer(dict(inputs), share_inputs=True)
            for tensor in self.spec.outputs:
                array, wanted = found[tensor.name], tensor.shape(sizes)
                if array.shape != wanted or marked(array):
                    raise MemoryError(f"openvino left {tensor.name} {wanted} unwritten")
        except Exception as error:
            # What ran out of memory stays as it was then, for every later request of any size.
            with self._compiling:
                self.compiled.clear()
            if is_out_of_memory(error):
                self._check_spare(sizes, error)
                raise memory_error(error, f"{self.spec.file}: ") from None
            raise NumericalError(f"{self.spec.file}: {_reason(error)}") from None
        names = outputs or [tensor.name for tensor in self.spec.outputs]
        return {name: found[name] for name in names}

    def _check_shapes(self) -> None:
        """Raise ArtefactError where the graph's shapes do not fit together at one legal size.

        OpenVINO compares known sizes alone, and in a run reads past the end of what does not fit.
        """
        legal = self.spec.ranges.items()
        sizes = {
            axis: own.nearest(own.minimum + 2 * i * own.multiple)
            for i, (axis, own) in enumerate(legal, 1)
        }
        try:
            graph = self._of_size(tuple(tensor.shape(sizes) for tensor in self.spec.inputs))
            found = shapes_of(graph.outputs)
        except Exception as error:
            raise ArtefactError(f"{self.spec.file}: {_refusal(error)}. {REBUILD}") from None
        for tensor in self.spec.outputs:
            sides, wanted = found[tensor.name], tensor.shape(sizes)
            fits = all(side in (None, own) for side, own in zip(sides, wanted, strict=False))
            if not fits or len(sides) != len(wanted):
                raise ArtefactError(
                    f"{self.spec.file}: gives {tensor.name} {found[tensor.name]}; the manifest "
                    f"expects {tensor.shape(sizes)}. It is a graph of another model. {REBUILD}"
                )

    def _check_spare(self, sizes: Mapping[str, int], error: Exception) -> None:
        """Raise ArtefactError, now and ever after, where memory cannot have run out at `sizes`.

        A graph that is damaged behind the right hash shows like this, and its next run might end
        the process.
        """
        tensors = (*self.spec.inputs, *self.spec.outputs)
        numbers = sum(math.prod(tensor.shape(sizes)) for tensor in tensors)
        left = memory()["available"]
        if left is not None and left > SPARE + 4 * numbers * SPARE_TIMES:
            self.broken = (
                f"{self.spec.file}: openvino fails on it ({_reason(error)}) with {left >> 20} MiB "
                f"to spare, as on a damaged graph. {REBUILD}"
            )
            raise ArtefactError(self.broken) from None

    def _has_own_form(self, sizes: Mapping[str, int]) -> bool:
        """Whether steps at `sizes` of the named axes are compiled for these alone."""
        at_usual = (sizes.get("height"), sizes.get("width")) == self.usual
        return at_usual or math.prod(sizes.values()) >= OWN_TOKENS

    def _native(self, shapes: tuple[Shape, ...]) -> Any:
        """The graph compiled for inputs of these shapes, or for all."""
        with self._compiling:
            native = self.compiled.pop(shapes, None)
            if native is None:
                while len(self.compiled) >= OWN_FORMS:
                    del self.compiled[next(iter(self.compiled))]
                native = self._compile(self._of_size(shapes), self._kept(shapes))
            self.compiled[shapes] = native
            return native

    def _request(self, native: Any) -> Any:
        """This thread's request of a compiled graph."""
        own = self._threads.__dict__
        if own.get("native") is not native:
            own.update(native=native, request=native.create_infer_request())
        return own["request"]

    def _of_size(self, shapes: tuple[Shape, ...]) -> Any:
        """The graph of inputs of `shapes` alone, or of all."""
        if not shapes:
            return self.graph
        graph = self.graph.clone()
        names = (tensor.name for tensor in self.spec.inputs)
        graph.reshape(dict(zip(names, map(list, shapes), strict=True)))
        return graph

    def _kept(self, shapes: tuple[Shape, ...]) -> Path | None:
        """Where the graph compiled for `shapes` is kept; see `kernels`."""
        what = self.spec.sha256, sorted(self.properties.items()), shapes
        digest = sha256(json.dumps([*what, *machine()]).encode())
        return kernels.path_of(f"openvino-{digest[:32]}")

    def _compile(self, graph: Any, kept: Path | None = None) -> Any:
        """A graph compiled, or read from `kept`; see the class for what it raises."""
        try:
            return compiled(graph, self.properties, kept)
        except Exception as error:
            if is_out_of_memory(error):
                raise memory_error(error, f"{self.spec.file}: ") from None
            raise IncompatibleError(
                f"--provider openvino: {self.spec.file}: {_refusal(error)}. Check each "
                "--provider-option, or choose --provider cpu or --allow-fallback"
            ) from None


@functools.cache
def machine() -> list[str]:
    """What a compiled graph depends on beside the graph: library, processor and this file."""
    library = load_library().__version__
    name, able = (
        str(load_core().get_property(DEVICE, key))
        for key in ("FULL_DEVICE_NAME", "OPTIMIZATION_CAPABILITIES")
    )
    return [library, name, able, sha256(Path(__file__).read_bytes())]


def compiled(graph: Any, properties: Mapping[str, Any], kept: Path | None) -> Any:
    """A graph as OpenVINO compiles it, read from the file `kept` where that is whole.

    Kept here and not by OpenVINO's own CACHE_DIR, which reads damaged files and grows for ever.
    """
    data = kernels.read(kept) if kept else None
    if data is not None:
        with contextlib.suppress(RuntimeError):
            return load_core().import_model(data, DEVICE, dict(properties))
    native = load_core().compile_model(graph, DEVICE, dict(properties))
    if kept:
        kernels.write(kept, native.export_model().getvalue())
    return native


def shapes_of(ports: Any) -> dict[str, list[int | None]]:
    """The axes of a graph's inputs or outputs by name, None where they are dynamic."""
    return {
        port.any_name: [
            None if axis.is_dynamic else axis.get_length() for axis in port.partial_shape
        ]
        for port in ports
    }


def _nothing() -> Any:
    """A graph that hands its input on."""
    from openvino import Model, Type, opset13

    x = opset13.parameter([1], Type.f32)
    return Model([opset13.result(x)], [x])


def mark(array: Array) -> None:
    """Write a NaN that no arithmetic makes to an output's first place.

    With one thread, OpenVINO 2026.4 drops the error of an allocation that fails within a run and
    gives the results of the run before it; such an output still bears the mark.
    """
    array.reshape(-1)[:1].view(np.uint32)[:] = MARK


def marked(array: Array) -> bool:
    return bool((array.reshape(-1)[:1].view(np.uint32) == MARK).any())


def properties(spec: GraphSpec, options: EngineOptions) -> dict[str, Any]:
    """OpenVINO's properties for a graph: one request at a time is fast; the user's own on top.

    The precision is always said: left alone, OpenVINO takes bf16 where the CPU has it. Raises
    IncompatibleError for bf16 where it has not.
    """
    half = options.precision == "bf16" and spec.lifetime == "step"
    able = load_core().get_property(DEVICE, "OPTIMIZATION_CAPABILITIES")
    if half and "BF16" not in able:
        raise IncompatibleError(
            f"--precision bf16: this CPU has {', '.join(able)} in OpenVINO; expected BF16 "
            "(AVX-512 BF16 or AMX). Choose --precision fp32"
        )
    chosen = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if half else "f32",
        **KEPT_KERNELS,
    }
    if options.threads:
        chosen["INFERENCE_NUM_THREADS"] = str(options.threads)
    return chosen | dict(options.provider_options)


def spell_out_broadcasts(model: Any) -> None:
    """Give products of tokens `[1, n, d]` and constant weights `[a, d, e]` a fourth axis.

    As they stand, OpenVINO 2026.4 turns them into a layer that has no broadcast over `a`: it
    refuses the shape, or writes past its output. With a leading axis of 1 they stay products.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul":
            continue
        tokens, weights = node.input_values()
        constant = weights.get_node().get_type_name() == "Constant"
        ranks = [port.get_partial_shape().rank for port in (tokens, weights)]
        if not constant or any(rank.is_dynamic or rank.get_length() != 3 for rank in ranks):
            continue
        attributes = node.get_attributes()
        flips = attributes["transpose_a"], attributes["transpose_b"]
        product = opset13.matmul(opset13.unsqueeze(tokens, [0]), weights, *flips)
        node.output(0).replace(opset13.squeeze(product, [0]).output(0))


def reduce_tokens(model: Any) -> None:
    """Take sums over tokens by reductions, where the graph has products with a row of one number.

    OpenVINO reduces tokens in half the time of such a product, and squares as it does so; ONNX
    Runtime takes the product in less time than its own reduction.
    """
    from openvino import opset13

    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or any(node.get_attributes().values()):
            continue
        number = repeated(node.input_value(0))
        if number is None:
            continue
        tokens, readers = node.input_value(1), node.output(0).get_target_inputs()
        square, root = tokens.get_node(), next(iter(readers)).get_node()
        factors = square.input_values() if square.get_type_name() == "Multiply" else [None, tokens]
        if factors[0] == factors[1] and len(readers) == 1 and root.get_type_name() == "Sqrt":
            norm = opset13.reduce_l2(factors[0], [-2], keep_dims=True)
            root.output(0).replace(opset13.multiply(norm, opset13.sqrt(number)).output(0))
        else:
            total = opset13.reduce_sum(tokens, [-2], keep_dims=True)
            node.output(0).replace(opset13.multiply(total, number).output(0))


def repeated(row: Any) -> Any:
    """The number that a row `[1, 1, n]` repeats, where it is one number over another; or None."""
    from openvino import PartialShape, opset13

    shape, quotient = row.get_partial_shape(), row.get_node()
    is_row = shape.rank.is_static and len(shape) == 3 and shape[0] == shape[1] == 1
    if not is_row or quotient.get_type_name() != "Divide":
        return None
    filled, count = quotient.input_values()
    if filled.get_node().get_type_name() != "Broadcast":
        return None
    one = filled.get_node().input_value(0)
    if any(port.get_partial_shape() != PartialShape([]) for port in (one, count)):
        return None
    return opset13.divide(one, count)


def _refusal(error: Exception) -> str:
    return f"openvino {load_library().__version__} refuses it ({_reason(error)})"


def _reason(error: Exception) -> str:
    """The last line that says something: the lines before it are places in OpenVINO's source."""
    lines = [line.strip() for line in str(error).splitlines()]
    said = [line for line in lines if line and not line.startswith("Exception from")]
    return said[-1] if said else type(error).__name__
