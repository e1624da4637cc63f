"""What the runtime computes in numpy around a bundle's graphs, as functions of ONNX.

Coordinates, guidance, a solver's step, the mean of a larger decode: each says where its like is in
the runtime. Letters: B images, C latent channels, H × W latent.
"""

from fractions import Fraction

from onnx import FunctionProto, parser

from export.to_onnx import OPSET
from runtime.pipeline.tiles import DENSITY, FEWEST_AVERAGED, MOST_AVERAGED

OWN = "own"  # their domain
# A row of the table. x0 = p · x + q · eps, x' = keep · x + move · eps + c · x0₋₁ + d · x0₋₂, and
# the weights of eps are guidance_scale where `guided` is 1, that of the condition alone where 0.
COLUMNS = ("alpha_bar", "log_snr", "keep", "move", "p", "q", "c", "d", "guided")
DENSE = Fraction(DENSITY) ** 2
FEWER = ", ".join(map(str, range(FEWEST_AVERAGED, MOST_AVERAGED)))

FUNCTIONS = f"""
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
line (count) => (places) {{
  # from -1 to 1; a single place is the first. Symmetric, so that float32 is exact to its last bit
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  two = Constant <value_int = 2> ()
  others = Sub (count, one)
  gaps = Max (others, one)
  index = Range (zero, count, one)
  twice = Mul (index, two)
  centred = Sub (twice, gaps)
  above = Cast <to = 1> (centred)
  below = Cast <to = 1> (gaps)
  places = Div (above, below)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
grid (size) => (coordinates) {{
  # runtime.coordinates: [H, W, 4]
  half = Constant <value_float = 0.5> ()
  margin = Constant <value_float = 1e-6> ()
  y_axis = Constant <value_int = 0> ()
  x_axis = Constant <value_int = 1> ()
  y_others = Constant <value_ints = [1, 2]> ()
  x_others = Constant <value_ints = [0, 2]> ()
  each = Constant <value_ints = [1]> ()
  sides = Cast <to = 1> (size)
  longer = ReduceMax <keepdims = 0> (sides)
  shares = Div (sides, longer)
  halves = Mul (shares, half)
  spans = Sub (halves, margin)
  edge = Sub (half, margin)
  height = Gather (size, y_axis)
  width = Gather (size, x_axis)
  y_span = Gather (spans, y_axis)
  x_span = Gather (spans, x_axis)
  y_line = own.line (height)
  x_line = own.line (width)
  y_places = Unsqueeze (y_line, y_others)
  x_places = Unsqueeze (x_line, x_others)
  whole = Concat <axis = 0> (size, each)
  y = Expand (y_places, whole)
  x = Expand (x_places, whole)
  square_x = Mul (x, x_span)
  square_y = Mul (y, y_span)
  edge_x = Mul (x, edge)
  edge_y = Mul (y, edge)
  coordinates = Concat <axis = 2> (square_x, square_y, edge_x, edge_y)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
branches (condition) => (distinct, place) {{
  # the null condition and each image's own [1 + B, labels], and which is whose [2, B]
  zero = Constant <value_int = 0> ()
  one = Constant <value_int = 1> ()
  front = Constant <value_ints = [1, 0, 0, 0]> ()
  rows = Constant <value_ints = [2, -1]> ()
  distinct = Pad (condition, front)
  batch = Shape <start = 0, end = 1> (condition)
  count = Squeeze (batch)
  last = Add (count, one)
  own = Range (one, last, one)
  null = Mul (own, zero)
  both = Concat <axis = 0> (null, own)
  place = Reshape (both, rows)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
guided (eps, guidance_scale, row) => (found) {{
  # runtime.sampling.guidance of two branches: [2, B, C, H, W] -> [B, C, H, W]
  one = Constant <value_float = 1.0> ()
  branch = Constant <value_ints = [0]> ()
  column = Constant <value_int = {COLUMNS.index("guided")}> ()
  inside = Gather (row, column)
  beyond = Sub (guidance_scale, one)
  more = Mul (beyond, inside)
  weight = Add (more, one)
  null, own = Split <axis = 0, num_outputs = 2> (eps)
  taken = Mul (null, more)
  given = Mul (own, weight)
  both = Sub (given, taken)
  found = Squeeze (both, branch)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
solved (x, eps, before, earlier, row) => (next, x0) {{
  # runtime.sampling.loop; column by column, since shaders take few tensors at once
  keep_column = Constant <value_int = {COLUMNS.index("keep")}> ()
  keep = Gather (row, keep_column)
  move_column = Constant <value_int = {COLUMNS.index("move")}> ()
  move = Gather (row, move_column)
  p_column = Constant <value_int = {COLUMNS.index("p")}> ()
  p = Gather (row, p_column)
  q_column = Constant <value_int = {COLUMNS.index("q")}> ()
  q = Gather (row, q_column)
  c_column = Constant <value_int = {COLUMNS.index("c")}> ()
  c = Gather (row, c_column)
  d_column = Constant <value_int = {COLUMNS.index("d")}> ()
  d = Gather (row, d_column)
  x_part = Mul (x, p)
  eps_part = Mul (eps, q)
  x0 = Add (x_part, eps_part)
  kept = Mul (x, keep)
  moved = Mul (eps, move)
  first = Mul (before, c)
  second = Mul (earlier, d)
  linear = Add (kept, moved)
  history = Add (first, second)
  next = Add (linear, history)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
averaged <pixels_per_latent> (latent, size) => (factor) {{
  # runtime.pipeline.tiles.averaged in whole numbers: not every engine has float64. The factor f is
  # the least with f² · pixels >= (density · ratio)² · cells, within its bounds
  ratio = Constant <value_int: int = @pixels_per_latent> ()
  numerator = Constant <value_int = {DENSE.numerator}> ()
  denominator = Constant <value_int = {DENSE.denominator}> ()
  one = Constant <value_int = 1> ()
  fewest = Constant <value_int = {FEWEST_AVERAGED}> ()
  fewer = Constant <value_ints = [{FEWER}]> ()
  cells = ReduceProd <keepdims = 0> (latent)
  pixels = ReduceProd <keepdims = 0> (size)
  area = Mul (ratio, ratio)
  trained = Mul (area, cells)
  wanted = Mul (trained, numerator)
  squares = Mul (fewer, fewer)
  there = Mul (pixels, denominator)
  given = Mul (squares, there)
  short = Less (given, wanted)
  each = Cast <to = 7> (short)
  more = ReduceSum <keepdims = 0> (each)
  whole = Add (fewest, more)
  enough = LessOrEqual (trained, pixels)
  factor = Where (enough, one, whole)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
reduced (fine, factor, size) => (pixels) {{
  # runtime.pipeline.tiles.reduced
  first = Constant <value_ints = [0]> ()
  second = Constant <value_ints = [1]> ()
  as_they_are = Constant <value_ints = [0, 0]> ()
  within = Constant <value_ints = [3, 5]> ()
  height = Gather (size, first)
  width = Gather (size, second)
  each = Unsqueeze (factor, first)
  shape = Concat <axis = 0> (as_they_are, height, each, width, each)
  parts = Reshape (fine, shape)
  pixels = ReduceMean <keepdims = 0> (parts, within)
}}
<domain: "own", opset_import: ["" : {OPSET}, "own" : 1]>
shown (pixels) => (found) {{
  # [-1, 1] -> [0, 1]
  zero = Constant <value_float = 0.0> ()
  half = Constant <value_float = 0.5> ()
  one = Constant <value_float = 1.0> ()
  scaled = Mul (pixels, half)
  moved = Add (scaled, half)
  found = Clip (moved, zero, one)
}}
"""


def own_functions() -> list[FunctionProto]:
    """All of them."""
    head = "<domain:"
    return [parser.parse_function(head + text) for text in FUNCTIONS.split(head)[1:]]
