"""A graph's form for CPUs: blocks of axial attention a part of their tokens at a time, exactly.

Where every pixel is a token a block's maps are what memory goes to: at 1024×1024 pixels and a width
of 128 each is half a gigabyte, and queries, keys, values and norms of all tokens are a dozen. Here
Scans take lines, or chunks of tokens, from the maps; what lies between a block's input and its
attention's result is only ever that of a part. Three maps at once are left: a block's input, what
the columns have read, and the attention's result, or these two and the block's output.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from onnx import NodeProto, helper, numpy_helper, parser

from export.chunk import FEWEST_ROWS, MOST_CHUNKS
from export.chunk_attention import DOMAIN, MOST_SCORES

HEAD = '<domain: "local", opset_import: ["": 20]>\n'
# x [B, N, d] and its mean [B, 1, d] -> the mean square of their difference, a chunk at a time.
SPREAD = (
    HEAD
    + """Spread (x, mean) => (spread) {
    chunk = Constant <value_ints = [16384]> ()
    one = Constant <value_ints = [1]> ()
    first = Constant <value_int = 0> ()
    step = Constant <value_int = 16384> ()
    tokens = Shape <start = 1, end = 2> (x)
    end = Squeeze (tokens)
    starts = Range (first, end, step)
    none = Sub (mean, mean)
    total = Scan <num_scan_inputs = 1, body = part (float[?, ?, ?] before, int64 at)
        => (float[?, ?, ?] after) {
            low = Unsqueeze (at, first)
            high = Add (low, chunk)
            own = Slice (x, low, high, one)
            far = Sub (own, mean)
            square = Mul (far, far)
            sum = ReduceSum <keepdims = 1> (square, one)
            after = Add (before, sum)
        }> (none, starts)
    count = Cast <to = 1> (tokens)
    spread = Div (total, count)
}
"""
)
# Of lines n [B, L, n, d]: read [B, L, n, d].
LINES = """
            qkv = MatMul (lines, weight)
            q_plain, k_plain, v = Split <axis = -1, num_outputs = 3> (qkv)
            q_bias, k_bias = Split <axis = -1, num_outputs = 2> (bias)
            q = Add (q_plain, q_bias)
            k = Add (k_plain, k_bias)
            apart = Constant <value_ints: ints = @apart> ()
            q_split = Reshape (q, apart)
            k_split = Reshape (k, apart)
            v_split = Reshape (v, apart)
            q_heads = Transpose <perm = [0, 1, 3, 2, 4]> (q_split)
            k_heads = Transpose <perm = [0, 1, 3, 4, 2]> (k_split)
            v_heads = Transpose <perm = [0, 1, 3, 2, 4]> (v_split)
            logits = MatMul (q_heads, k_heads)
            shares = Softmax <axis = -1> (logits)
            read_heads = MatMul (shares, v_heads)
            read_split = Transpose <perm = [0, 1, 3, 2, 4]> (read_heads)
            joined = Constant <value_ints = [0, 0, 0, -1]> ()
            read_flat = Reshape (read_split, joined)
            read_out = MatMul (read_flat, out_weight)
            read = Add (read_out, out_bias)"""
# Parts: the fewest that divide a grid's lines and leave each at most @most scores.
PARTS = """
    first = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zeros = Constant <value_ints = [0]> ()
    beyond = Add (count, one)
    numbers = Range (one, beyond, one)
    rest = Mod (count, numbers)
    whole = Equal (rest, first)
    size = Div (count, numbers)
    limit = Constant <value_int: int = @most> ()
    square = Mul (length, length)
    images = Gather (grid_shape, first)
    heads = Constant <value_int: int = @heads> ()
    each_image = Mul (square, images)
    each_line = Mul (each_image, heads)
    scores = Mul (size, each_line)
    small = LessOrEqual (scores, limit)
    legal = And (whole, small)
    choices = Where (legal, numbers, count)
    parts = ReduceMin <keepdims = 0> (choices)
    taken = Div (count, parts)
    starts = Range (first, count, taken)
    taken_list = Unsqueeze (taken, zeros)
    grid = Reshape (x, grid_shape)
    side = Unsqueeze (mean, one_list)
    rise = Unsqueeze (gain, one_list)
"""
ATTRIBUTES = "<heads, most, apart>"
GIVEN = "x, mean, gain, shift, grid_shape, weight, bias, out_weight, out_bias"
COLUMNS = (
    HEAD
    + f"Columns {ATTRIBUTES} ({GIVEN}) => (stacked) {{"
    + """
    one_list = Constant <value_ints = [1]> ()
    tall = Constant <value_int = 1> ()
    wide = Constant <value_int = 2> ()
    length = Gather (grid_shape, tall)
    count = Gather (grid_shape, wide)
"""
    + PARTS
    + """
    axis = Constant <value_ints = [2]> ()
    stacked = Scan <num_scan_inputs = 1, body = part (int64 at) => (float[?, ?, ?, ?] made) {
            low = Unsqueeze (at, zeros)
            high = Add (low, taken_list)
            own = Slice (grid, low, high, axis)
            far = Sub (own, side)
            scaled = Mul (far, rise)
            normed = Add (scaled, shift)
            lines = Transpose <perm = [0, 2, 1, 3]> (normed)"""
    + LINES
    + """
            made = Transpose <perm = [0, 2, 1, 3]> (read)
        }> (starts)
}
"""
)
ROWS = (
    HEAD
    + f"Rows {ATTRIBUTES} ({GIVEN}, stacked) => (w) {{"
    + """
    one_list = Constant <value_ints = [1]> ()
    tall = Constant <value_int = 1> ()
    wide = Constant <value_int = 2> ()
    length = Gather (grid_shape, wide)
    count = Gather (grid_shape, tall)
"""
    + PARTS
    + """
    axis = Constant <value_ints = [2]> ()
    flat = Shape (x)
    made = Scan <num_scan_inputs = 1, body = part (int64 at) => (float[?, ?, ?, ?] after) {
            low = Unsqueeze (at, zeros)
            high = Add (low, taken_list)
            own = Slice (grid, low, high, one_list)
            far = Sub (own, side)
            scaled = Mul (far, rise)
            lines = Add (scaled, shift)"""
    + LINES
    + """
            stripes = Slice (stacked, low, high, axis)
            beside = Transpose <perm = [1, 2, 0, 3, 4]> (stripes)
            like = Shape (own)
            columns = Reshape (beside, like)
            both = Add (read, columns)
            after = Add (own, both)
        }> (starts)
    by_image = Transpose <perm = [1, 0, 2, 3, 4]> (made)
    w = Reshape (by_image, flat)
}
"""
)
# x + outer · (w + FFN(norm of w)); N in as many chunks as divide it, of FEWEST_ROWS at least.
FINISH = (
    HEAD
    + f"""Finish (x, w, mean, gain, shift, up, up_bias, down, down_bias, outer) => (out) {{
    first = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    zeros = Constant <value_ints = [0]> ()
    axis = Constant <value_ints = [1]> ()
    tokens = Shape <start = 1, end = 2> (x)
    count = Squeeze (tokens)
    beyond = Constant <value_int = {MOST_CHUNKS + 1}> ()
    numbers = Range (one, beyond, one)
    rest = Mod (count, numbers)
    divides = Equal (rest, first)
    rows = Constant <value_int = {FEWEST_ROWS}> ()
    least = Mul (numbers, rows)
    fits = LessOrEqual (least, count)
    legal = And (divides, fits)
    choices = Where (legal, numbers, one)
    parts = ReduceMax <keepdims = 0> (choices)
    taken = Div (count, parts)
    starts = Range (first, count, taken)
    taken_list = Unsqueeze (taken, zeros)
    flat = Shape (x)
    made = Scan <num_scan_inputs = 1, body = part (int64 at) => (float[?, ?, ?] after) {{
            low = Unsqueeze (at, zeros)
            high = Add (low, taken_list)
            own = Slice (w, low, high, axis)
            before = Slice (x, low, high, axis)
            far = Sub (own, mean)
            scaled = Mul (far, gain)
            normed = Add (scaled, shift)
            raised = MatMul (normed, up)
            hidden = Add (raised, up_bias)
            gate = Sigmoid (hidden)
            active = Mul (hidden, gate)
            lowered = MatMul (active, down)
            fed = Add (lowered, down_bias)
            both = Add (own, fed)
            scaled_both = Mul (both, outer)
            after = Add (before, scaled_both)
        }}> (starts)
    by_image = Transpose <perm = [1, 0, 2, 3]> (made)
    out = Reshape (by_image, flat)
}}
"""
)
FUNCTIONS = (SPREAD, COLUMNS, ROWS, FINISH)


@dataclass(frozen=True)
class Normed:
    """n = (x - mean) · gain + shift, by the names of its parts."""

    x: str
    mean: str
    gain: str
    shift: str


class Finder:
    """Looks at a graph from what it makes back to what that is made of."""

    def __init__(self, graph: onnx.GraphProto):
        self.graph = graph
        self.maker = {name: node for node in graph.node for name in node.output}
        self.constants = {tensor.name: tensor for tensor in graph.initializer}

    def made(self, name: str, kind: str) -> NodeProto | None:
        """The node that makes `name`, if it is of that kind."""
        node = self.maker.get(name)
        return node if node is not None and node.op_type == kind else None

    def back(self, name: str, *kinds: str) -> NodeProto | None:
        """The last of a chain of nodes of these kinds, each making the first input of the last."""
        node = None
        for kind in kinds:
            node = self.made(name, kind)
            if node is None:
                return None
            name = node.input[0]
        return node

    def split(self, node: NodeProto | None, kind: str) -> tuple[str, NodeProto] | None:
        """A node's other input, and the maker of the one that is made by `kind`."""
        for place in (1, 0) if node is not None else ():
            found = self.made(node.input[place], kind)  # type: ignore[union-attr]
            if found is not None:
                return node.input[1 - place], found  # type: ignore[union-attr]
        return None

    def normed(self, name: str) -> Normed | None:
        """What a norm is made of."""
        shifted = self.made(name, "Add")
        scaled = self.made(shifted.input[0], "Mul") if shifted else None
        far = self.made(scaled.input[0], "Sub") if scaled else None
        if shifted is None or scaled is None or far is None:
            return None
        return Normed(far.input[0], far.input[1], scaled.input[1], shifted.input[1])

    def biased(self, node: NodeProto | None) -> tuple[str, str, str] | None:
        """Of x @ weight + bias the names of x, weight and bias."""
        product = self.made(node.input[0], "MatMul") if node and node.op_type == "Add" else None
        if node is None or product is None or product.input[1] not in self.constants:
            return None
        return product.input[0], product.input[1], node.input[1]

    def lines(self, name: str) -> tuple[str, list[str], int] | None:
        """Of an attention of lines: the lines, its four weights and biases, its heads."""
        out = self.biased(self.maker.get(name))
        read = self.back(out[0], "Reshape", "Transpose", "MatMul") if out else None
        scores = self.back(read.input[0], "Softmax", "MatMul") if read else None
        if out is None or read is None or scores is None:
            return None
        value = self.back(read.input[1], "Transpose", "Reshape", "Slice", "MatMul")
        query = self.back(scores.input[0], "Gather", "Transpose", "Reshape")
        added = self.made(query.input[0], "Add") if query else None
        shape = self.made(query.input[1], "Concat") if query else None
        heads = self.constants.get(shape.input[4]) if shape and len(shape.input) == 6 else None
        if value is None or added is None or heads is None:
            return None
        given = [value.input[1], added.input[1], out[1], out[2]]
        return value.input[0], given, int(numpy_helper.to_array(heads)[0])


def chunk_axial(model: onnx.ModelProto, most_scores: int = MOST_SCORES) -> onnx.ModelProto | None:
    """A copy of `model` with its blocks of axial attention in parts; None where it has none."""
    chunked = onnx.ModelProto()
    chunked.CopyFrom(model)
    graph = chunked.graph
    finder = Finder(graph)
    attending = {id(n): c for n in graph.node if (c := attention_calls(finder, n, most_scores))}
    if not attending:
        return None
    nodes: list[NodeProto] = []
    for node in graph.node:
        calls = attending.get(id(node)) or finish_calls(finder, node) or spread_calls(finder, node)
        nodes += calls or [node]
    del graph.node[:]
    graph.node.extend(used(nodes, {value.name for value in graph.output}))
    read = {name for node in graph.node for name in node.input}
    constants = [tensor for tensor in graph.initializer if tensor.name in read]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    chunked.functions.extend(parser.parse_function(text) for text in FUNCTIONS)
    chunked.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(chunked)
    return chunked


def attention_calls(finder: Finder, node: NodeProto, most_scores: int) -> list[NodeProto] | None:
    """In place of a block's x + rows + columns."""
    ends = finder.split(node, "Reshape") if node.op_type == "Add" else None
    both = finder.made(ends[1].input[0], "Add") if ends else None
    sides = finder.split(both, "Transpose")
    if ends is None or sides is None:
        return None
    rows, columns = finder.lines(sides[0]), finder.lines(sides[1].input[0])
    turned = finder.made(columns[0], "Transpose") if columns else None
    if rows is None or columns is None or turned is None or turned.input[0] != rows[0]:
        return None
    grid = finder.made(rows[0], "Reshape")
    norm = finder.normed(grid.input[0]) if grid else None
    if grid is None or norm is None or norm.x != ends[0]:
        return None
    out, given = node.output[0], [norm.x, norm.mean, norm.gain, norm.shift, grid.input[1]]
    stacked, heads = f"{out}_columns", rows[2]
    settings: dict[str, Any] = {"heads": heads, "most": most_scores, "apart": [0, 0, 0, heads, -1]}

    def call(kind: str, inputs: list[str], made: str) -> NodeProto:
        return helper.make_node(kind, inputs, [made], domain=DOMAIN, **settings)

    return [
        call("Columns", [*given, *columns[1]], stacked),
        call("Rows", [*given, *rows[1], stacked], out),
    ]


def finish_calls(finder: Finder, node: NodeProto) -> list[NodeProto] | None:
    """In place of what follows a block's attentions."""
    ends = finder.split(node, "Mul") if node.op_type == "Add" else None
    scaled = finder.split(ends[1], "Add") if ends else None
    sides = finder.split(scaled[1], "Add") if scaled else None
    down = finder.biased(sides[1]) if sides else None
    active = finder.made(down[0], "Mul") if down else None
    up = finder.biased(finder.maker.get(active.input[0])) if active else None
    norm = finder.normed(up[0]) if up else None
    if not (ends and scaled and sides and down and up and norm) or norm.x != sides[0]:
        return None
    inputs = [ends[0], norm.x, norm.mean, norm.gain, norm.shift]
    inputs += [*up[1:], *down[1:], scaled[0]]
    return [helper.make_node("Finish", inputs, [*node.output], domain=DOMAIN)]


def spread_calls(finder: Finder, node: NodeProto) -> list[NodeProto] | None:
    """In place of a mean of squares over tokens."""
    square = finder.made(node.input[1], "Mul") if node.op_type == "MatMul" else None
    if square is None or square.input[0] != square.input[1]:
        return None
    far = finder.made(square.input[0], "Sub")
    if far is None:
        return None
    return [helper.make_node("Spread", [*far.input], [*node.output], domain=DOMAIN)]


def used(nodes: list[NodeProto], wanted: set[str]) -> Iterator[NodeProto]:
    """The nodes that something takes an output of, in their order."""
    readers: dict[str, int] = defaultdict(int)
    kept: list[NodeProto] = []
    for node in reversed(nodes):
        if any(name in wanted or readers[name] for name in node.output):
            kept.append(node)
            for name in node.input:
                readers[name] += 1
    return reversed(kept)
