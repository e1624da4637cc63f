"""A bundle's graphs as one, from noise to pixels, of the standard's own operators alone.

Every graph of the bundle becomes a function, the program around them calls each where its lifetime
begins, and ONNX's inliner puts the bodies in.

Letters: B images, K conditions, S steps, C latent channels, c colours, H × W latent, h × w pixels.
"""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import (
    FunctionProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    ValueInfoProto,
    helper,
    inliner,
    numpy_helper,
)

from export.picture_functions import COLUMNS, OWN, own_functions
from export.to_onnx import OPSET
from export.wheel import halved
from runtime.bundle.interface import ScheduleData
from runtime.bundle.manifest import Array, Axis, Manifest
from runtime.errors import ResourceError
from runtime.pipeline.diffuser import LARGEST_LOG_SNR
from runtime.pipeline.tiler import Roles
from runtime.pipeline.wiring import EPS, KEPT, LATENT, wires
from runtime.sampling.request import Request
from runtime.sampling.schedule import log_snr
from runtime.sampling.solvers import Table

LARGEST = (1 << 31) - (1 << 24)  # bytes of all graphs; Protocol Buffers end at 2 GiB
MOST_PARTS = 4
IR_VERSION = 10  # that of the bundle's graphs
GRAPH = "graph"  # the domain of the functions that the bundle's graphs become; none is left


def table_rows(table: Table, guided: Array) -> NDArray[np.float32]:
    """The table of a deterministic run `[S, 9]`, its columns as in COLUMNS; guided bool `[S]`."""
    alpha_bar = table.alpha_bar[:-1]
    keep, move, c, d, _ = np.array([table.update(step) for step in range(len(table))]).T
    logs = np.clip(log_snr(alpha_bar), -LARGEST_LOG_SNR, LARGEST_LOG_SNR)
    p, q = table.rows[:, :2].T
    columns = alpha_bar, logs, keep, move, p, q, c, d, guided
    return np.stack(columns, 1).astype(np.float32)


def request_rows(request: Request, data: ScheduleData) -> NDArray[np.float32]:
    """`table_rows` of a request without eta, over a bundle's schedule."""
    table, (low, high) = request.table(data), request.guidance_interval
    times = request.schedule(data).time(log_snr(table.alpha_bar[:-1]))
    return table_rows(table, (times >= low) & (times <= high))


def picture_graph(
    manifest: Manifest, table: Array, open_table: bool = False, half: bool = False
) -> ModelProto:
    """The whole picture of a bundle as one model; see `export.single_file` for what it takes.

    `table` float32 `[S, 9]`, as `request_rows` gives it, is the default of an input that may be
    left out; where it is open, the input may not.
    """
    program = Program(manifest)
    nodes = program.nodes()
    functions = [graph_function(manifest, name, half) for name in program.called]
    if (size := sum(function.ByteSize() for function in functions)) > LARGEST:
        raise ResourceError(
            f"the weights have {size} bytes; expected less than 2 GiB, which is all that one ONNX "
            "file holds. Pass --half, or use the bundle's graphs one by one"
        )
    constants = [] if open_table else [numpy_helper.from_array(table, "table")]
    graph = helper.make_graph(nodes, "picture", program.inputs(), program.outputs(), constants)
    model = helper.make_model(
        graph,
        functions=[*own_functions(), *functions],
        opset_imports=[helper.make_opsetid(*own) for own in (("", OPSET), (OWN, 1), (GRAPH, 1))],
        ir_version=IR_VERSION,
        producer_name="r2-edge-toolkit",
    )
    inlined = inliner.inline_local_functions(model)
    del inlined.opset_import[1:]
    onnx.checker.check_model(inlined, full_check=True)
    return inlined


def graph_function(manifest: Manifest, name: str, half: bool) -> FunctionProto:
    """A graph of a bundle as a function of its name, its weights as constants."""
    spec = manifest.graphs[name]
    model = onnx.load_from_string(manifest.file_bytes(spec))
    graph = sliced(halved(model) if half else model)
    weights = [helper.make_node("Constant", [], [t.name], value=t) for t in graph.initializer]
    inputs, outputs = ([tensor.name for tensor in side] for side in (spec.inputs, spec.outputs))
    imports = [helper.make_opsetid("", OPSET)]
    return helper.make_function(GRAPH, name, inputs, outputs, [*weights, *graph.node], imports)


def sliced(model: ModelProto) -> GraphProto:
    """A model's graph whose splits into many parts are slices: shaders take few tensors at once."""
    graph = onnx.shape_inference.infer_shapes(model).graph
    known = {v.name: v.type.tensor_type.shape.dim for v in (*graph.input, *graph.value_info)}
    weights = {tensor.name: tensor for tensor in graph.initializer}
    nodes: list[NodeProto] = []
    for node in graph.node:
        if node.op_type != "Split" or len(node.output) <= MOST_PARTS:
            nodes.append(node)
            continue
        axis = next((a.i for a in node.attribute if a.name == "axis"), 0)
        if len(node.input) > 1:
            ends = np.cumsum(numpy_helper.to_array(weights[node.input[1]]))
        else:
            width, count = known[node.input[0]][axis].dim_value, len(node.output)
            ends = np.minimum(np.arange(1, count + 1) * -(-width // count), width)
        for name, start, end in zip(node.output, [0, *ends[:-1]], ends, strict=True):
            numbers = {f"{name}.start": start, f"{name}.end": end, f"{name}.axis": axis}
            nodes += [constant(key, np.array([number])) for key, number in numbers.items()]
            nodes.append(helper.make_node("Slice", [node.input[0], *numbers], [name]))
    del graph.node[:]
    graph.node.extend(nodes)
    return graph


class Program:
    """The nodes around the functions, in the order of their runs.

    What a bundle's graphs call their tensors stands behind a slash here, apart from names of ours.
    """

    def __init__(self, manifest: Manifest):
        self.manifest, self.interface = manifest, manifest.interface
        self.axes = wires(manifest)
        self.latent: tuple[Axis, ...] = ("batch", self.interface.latent_channels, "height", "width")
        self.step = manifest.graphs[manifest.step_graph]
        self.kept = manifest.of_lifetime(*KEPT)
        self.roles = Roles.of(manifest) if self.interface.decoupled else None
        drawing = [self.roles.read_latent, self.roles.decode] if self.roles else []
        self.called = [*self.kept, manifest.step_graph, *drawing]
        graphs = manifest.graphs
        self.conditional = any(graphs[name].takes("condition") for name in self.kept)

    def inputs(self) -> list[ValueInfoProto]:
        """noise, condition and guidance_scale, size, table, as far as the bundle needs them."""
        found = [value("noise", *self.latent)]
        if self.conditional:
            found.append(value("condition", "batch", len(self.interface.labels)))
            found.append(value("guidance_scale"))
        if self.roles is not None:
            found.append(value("size", 2, kind=TensorProto.INT64))
        return [*found, value("table", "steps", len(COLUMNS))]

    def outputs(self) -> list[ValueInfoProto]:
        """pixels `[B, c, h, w]` in [0, 1]."""
        sides = ("image_height", "image_width") if self.roles else ("height", "width")
        return [value("pixels", "batch", self.interface.color_channels, *sides)]

    def nodes(self) -> list[NodeProto]:
        """All of them."""
        nodes = [
            *self.before(),
            helper.make_node(
                "Loop",
                ["count", "go", "noise", "nothing", "nothing"],
                ["latent", "x0", "x0_before"],
                body=self.body(),
            ),
        ]
        if self.roles is not None:
            return [*nodes, *self.drawing(self.roles), own("shown", ["drawn"], ["pixels"])]
        return [*nodes, own("shown", ["latent"], ["pixels"])]

    def before(self) -> list[NodeProto]:
        """What outlives a step."""
        node = helper.make_node
        nodes = [
            node("Shape", ["noise"], ["latent_size"], start=2, end=4),
            own("grid", ["latent_size"], ["/coordinates"]),
            node("Shape", ["table"], ["steps"], start=0, end=1),
            node("Squeeze", ["steps"], ["count"]),
            constant("go", np.array(True)),
            node("Sub", ["noise", "noise"], ["nothing"]),
        ]
        for column in ("alpha_bar", "log_snr"):
            nodes.append(constant(f"{column}_column", np.array(COLUMNS.index(column))))
            nodes.append(node("Gather", ["table", f"{column}_column"], [f"/{column}"], axis=1))
        if self.conditional:
            nodes.append(own("branches", ["condition"], ["/condition", "place"]))
        nodes += [self.call(name) for name in self.kept]
        for tensor in self.step.inputs:
            if self.axes.get(tensor.name, ())[:1] == ("conditions",):
                nodes.append(node("Gather", [f"/{tensor.name}", "place"], [f"each/{tensor.name}"]))
        return nodes

    def body(self) -> GraphProto:
        """A step: the loop's number and go-on, x and the last two x0 -> go-on, x and two x0."""
        node, given = helper.make_node, {LATENT: "x"}
        nodes = [
            node("Identity", ["going"], ["going_on"]),
            node("Gather", ["table", "number"], ["row"]),
        ]
        for name in (tensor.name for tensor in self.step.inputs if tensor.name != LATENT):
            axes, given[name] = self.axes[name], f"/{name}"
            if axes[:1] == ("conditions",):
                given[name] = f"each/{name}"
            if axes[:1] == ("steps",):
                given[name] = f"now/{name}"
                nodes.append(node("Gather", [f"/{name}", "number"], [given[name]]))
            if axes[:2] == ("steps", "conditions"):
                nodes.append(node("Gather", [given[name], "place"], [f"each/{name}"]))
                given[name] = f"each/{name}"
        inputs = [given[tensor.name] for tensor in self.step.inputs]
        outputs = [f"all/{tensor.name}" for tensor in self.step.outputs]
        nodes.append(node(self.manifest.step_graph, inputs, outputs, domain=GRAPH))
        if self.conditional:
            nodes.append(own("guided", [f"all/{EPS}", "guidance_scale", "row"], ["eps"]))
        else:
            nodes += [
                constant("first", np.array(0)),
                node("Gather", [f"all/{EPS}", "first"], ["eps"]),
            ]
        nodes.append(own("solved", ["x", "eps", "before", "earlier", "row"], ["next", "now"]))
        nodes.append(node("Identity", ["before"], ["was_before"]))
        number = value("number", kind=TensorProto.INT64)
        going, going_on = (value(name, kind=TensorProto.BOOL) for name in ("going", "going_on"))
        taken = [value(name, *self.latent) for name in ("x", "before", "earlier")]
        made = [value(name, *self.latent) for name in ("next", "now", "was_before")]
        return helper.make_graph(nodes, "step", [number, going, *taken], [going_on, *made])

    def drawing(self, roles: Roles) -> list[NodeProto]:
        """A latent as pixels in [-1, 1], whole."""
        node = helper.make_node
        per_cell = self.interface.pixels_per_latent
        return [
            node("Identity", ["latent"], [f"/{LATENT}"]),
            self.call(roles.read_latent),
            own("averaged", ["latent_size", "size"], ["factor"], pixels_per_latent=per_cell),
            node("Mul", ["size", "factor"], ["fine_size"]),
            own("grid", ["fine_size"], ["fine/coordinates"]),
            self.call(roles.decode, {"coordinates": "fine/coordinates"}),
            own("reduced", ["/pixels", "factor", "size"], ["drawn"]),
        ]

    def call(self, name: str, given: Mapping[str, str] = MappingProxyType({})) -> NodeProto:
        """A graph of the bundle, its tensors wired by name, or as `given` has it."""
        spec = self.manifest.graphs[name]
        inputs = [given.get(tensor.name, f"/{tensor.name}") for tensor in spec.inputs]
        outputs = [f"/{tensor.name}" for tensor in spec.outputs]
        return helper.make_node(name, inputs, outputs, domain=GRAPH)


def own(name: str, inputs: list[str], outputs: list[str], **attributes: Any) -> NodeProto:
    """A call of one of FUNCTIONS."""
    return helper.make_node(name, inputs, outputs, domain=OWN, **attributes)


def constant(name: str, value: Array) -> NodeProto:
    """A constant of that value."""
    return helper.make_node("Constant", [], [name], value=numpy_helper.from_array(value))


def value(name: str, *axes: Axis, kind: int = TensorProto.FLOAT) -> ValueInfoProto:
    """An input or output of these axes."""
    return helper.make_tensor_value_info(name, kind, axes)
