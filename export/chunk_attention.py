"""A graph's form for CPUs: softmax attention a part of its rows at a time, exactly.

An unfused attention holds the scores of all rows at once: at 1024×1024 pixels those of axial
attention are tens of gigabytes. Heads, and lines of a grid, are independent: above MOST_SCORES a
Scan takes as many of them at a time as stay below, one at least; the numbers are the same.
Compilers that fuse attention store no scores, so the plain graph stays theirs.
"""

from collections import defaultdict
from dataclasses import dataclass

import onnx
from onnx import NodeProto, helper, parser

MOST_SCORES = 1 << 21  # float32 of one part: 8 MB, about what a processor's cache holds
DOMAIN = "local"
# Rows are all axes but the last two; the parts are equal, as Scan wants them.
FUNCTION = """
<domain: "local", opset_import: ["": 20]>
Attention <most> (q, k, v) => (read) {
    lead = Shape <end = -2> (q)
    queries = Shape <start = -2, end = -1> (q)
    keys = Shape <start = -1> (k)
    width = Shape <start = -1> (v)
    rows = ReduceProd <keepdims = 1> (lead)
    first = Constant <value_int = 1> ()
    none = Constant <value_int = 0> ()
    every = Constant <value_ints = [-1]> ()
    limit = Constant <value_int: int = @most> ()
    last = ReduceProd <keepdims = 0> (lead)
    beyond = Add (last, first)
    numbers = Range (first, beyond, first)
    rest = Mod (rows, numbers)
    whole = Equal (rest, none)
    size = Div (rows, numbers)
    square = Mul (queries, keys)
    scores = Mul (size, square)
    small = LessOrEqual (scores, limit)
    legal = And (whole, small)
    choices = Where (legal, numbers, rows)
    parts = ReduceMin <keepdims = 1> (choices)
    q_tail = Shape <start = -2> (q)
    k_tail = Shape <start = -2> (k)
    v_tail = Shape <start = -2> (v)
    q_shape = Concat <axis = 0> (parts, every, q_tail)
    k_shape = Concat <axis = 0> (parts, every, k_tail)
    v_shape = Concat <axis = 0> (parts, every, v_tail)
    q_parts = Reshape (q, q_shape)
    k_parts = Reshape (k, k_shape)
    v_parts = Reshape (v, v_shape)
    made = Scan <num_scan_inputs = 3, body = part (float[r, n, e] a, float[r, e, m] b,
        float[r, m, f] c) => (float[r, n, f] d) {
            logits = MatMul (a, b)
            shares = Softmax <axis = -1> (logits)
            d = MatMul (shares, c)
        }> (q_parts, k_parts, v_parts)
    shape = Concat <axis = 0> (lead, queries, width)
    read = Reshape (made, shape)
}
"""


@dataclass(frozen=True)
class Attention:
    """q·kᵀ, softmax and the product with v: three nodes of a graph."""

    scores: NodeProto
    softmax: NodeProto
    read: NodeProto

    @property
    def inputs(self) -> list[str]:
        """q, kᵀ and v."""
        return [*self.scores.input, self.read.input[1]]

    def call(self, most_scores: int) -> NodeProto:
        """The function in place of the three nodes."""
        return helper.make_node(
            "Attention", self.inputs, [*self.read.output], domain=DOMAIN, most=most_scores
        )


def chunk_attention(
    model: onnx.ModelProto, most_scores: int = MOST_SCORES
) -> onnx.ModelProto | None:
    """A copy of `model` with every MatMul, Softmax, MatMul inside a Scan over parts of its rows.

    None where it has no such thing.
    """
    chunked = onnx.ModelProto()
    chunked.CopyFrom(model)
    graph = chunked.graph
    found = find_attentions(graph)
    if not found:
        return None
    replaced = {id(node) for own in found for node in (own.scores, own.softmax)}
    last = {id(own.read): own for own in found}
    nodes = [node for node in graph.node if id(node) not in replaced]
    made = [last[id(node)].call(most_scores) if id(node) in last else node for node in nodes]
    del graph.node[:]
    graph.node.extend(made)
    chunked.functions.append(parser.parse_function(FUNCTION))
    if all(entry.domain != DOMAIN for entry in chunked.opset_import):
        chunked.opset_import.append(helper.make_opsetid(DOMAIN, 1))
    onnx.checker.check_model(chunked)
    return chunked


def find_attentions(graph: onnx.GraphProto) -> list[Attention]:
    """The attentions of a graph whose scores nothing else takes, and which have no mask."""
    maker = {name: node for node in graph.node for name in node.output}
    users: dict[str, list[NodeProto]] = defaultdict(list)
    for node in graph.node:
        for name in node.input:
            users[name].append(node)
    weights = {tensor.name for tensor in graph.initializer}
    found = []
    for softmax in (node for node in graph.node if node.op_type == "Softmax"):
        scores, after = maker.get(softmax.input[0]), users[softmax.output[0]]
        if scores is None or scores.op_type != "MatMul" or len(users[softmax.input[0]]) != 1:
            continue
        if (
            len(after) != 1
            or after[0].op_type != "MatMul"
            or after[0].input[0] != softmax.output[0]
        ):
            continue
        own = Attention(scores, softmax, after[0])
        if not weights.intersection(own.inputs):
            found.append(own)
    return found
