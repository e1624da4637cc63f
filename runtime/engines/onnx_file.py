"""What an ONNX file may hold, checked on its bytes before any library parses them.

A bundle's graphs carry their weights. ONNX also lets a tensor name another file, which a library
would open: such a graph is refused, whatever that file's place. The bytes are walked as Protocol
Buffers, of which only the fields that lead to a tensor are followed.

Source of the field numbers: onnx.proto of ONNX 1.23.
"""

from collections.abc import Iterator, Mapping, Sequence

from runtime.bundle.manifest import REBUILD, Array, GraphSpec
from runtime.errors import ArtefactError

# message -> field number -> the message in that field
FIELDS = {
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "node": {5: "attribute"},
    "attribute": dict(
        zip((5, 6, 10, 11, 22, 23), 2 * ("tensor", "graph") + 2 * ("sparse tensor",), strict=True)
    ),
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {},
}
Shapes = Mapping[str, Sequence[int | str | None]]  # the axes of tensors by name
EXTERNAL_DATA, DATA_LOCATION = 13, 14
OUTPUT, ATTRIBUTE, NAME, INTEGER = 2, 5, 1, 3  # of a node the first two, of an attribute the others
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
SPLIT = b"num_outputs"
# The key of a file, "external", and what a Split says of itself.
MARKS = (b"location", bytes((DATA_LOCATION << 3 | VARINT, 1)), SPLIT)


def check_self_contained(model: bytes, file: str) -> None:
    """Raise ArtefactError where `model` is no ONNX file or keeps a tensor in another one."""
    waiting = [("model", memoryview(model))]
    found = set()
    try:
        while waiting:
            message, data = waiting.pop()
            found.add(message)
            if message == "node":
                _check_split(data, file)
            for field, value in _fields(data):
                if message == "tensor" and field in (EXTERNAL_DATA, DATA_LOCATION) and value:
                    raise ArtefactError(
                        f"{file}: keeps a tensor outside the file ({_location(value)}); "
                        f"expected a graph that holds its own weights. {REBUILD}"
                    )
                inner = FIELDS[message].get(field)
                if inner is None or isinstance(value, int):
                    continue
                # Nodes are many and small: those are walked alone that hold what such a tensor has.
                if inner != "node" or any(mark in bytes(value) for mark in MARKS):
                    waiting.append((inner, value))
    except (IndexError, ValueError) as error:
        if isinstance(error, ArtefactError):
            raise
        raise ArtefactError(_no_graph(file, str(error))) from None
    if "graph" not in found:
        raise ArtefactError(_no_graph(file, "it has no graph"))


def check_interface(spec: GraphSpec, inputs: Shapes, outputs: Shapes) -> None:
    """Raise ArtefactError where a graph that a library has opened is not the one that `spec` names.

    Axes are compared where both sides know a number.
    """
    for kind, wanted, found in (
        ("inputs", spec.inputs, inputs),
        ("outputs", spec.outputs, outputs),
    ):
        fits = {tensor.name for tensor in wanted} == found.keys() and all(
            len(tensor.axes) == len(found[tensor.name])
            and all(
                a == b
                for a, b in zip(tensor.axes, found[tensor.name], strict=True)
                if isinstance(a, int) and isinstance(b, int)
            )
            for tensor in wanted
        )
        if not fits:
            raise ArtefactError(
                f"{spec.file}: has the {kind} {dict(found)}; the manifest expects "
                f"{ {tensor.name: tensor.axes for tensor in wanted} }. It is a graph of another "
                f"model. {REBUILD}"
            )


def check_outputs(spec: GraphSpec, sizes: Mapping[str, int], found: Mapping[str, Array]) -> None:
    """Raise ArtefactError where a graph gave other shapes than `spec` says at `sizes`."""
    for tensor in spec.outputs:
        array = found.get(tensor.name)
        if array is not None and array.shape != tensor.shape(sizes):
            raise ArtefactError(
                f"{spec.file}: gives {tensor.name} {array.shape}; the manifest expects "
                f"{tensor.shape(sizes)}. It is a graph of another model. {REBUILD}"
            )


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(number, value) of each field: an integer, or the bytes of text, arrays and messages."""
    place = 0
    while place < len(data):
        key, place = _varint(data, place)
        kind = key & 7
        if kind == VARINT:
            value, place = _varint(data, place)
            yield key >> 3, value
            continue
        if kind not in (FIXED64, BYTES, FIXED32):
            raise ValueError(f"a field of kind {kind}")
        size = {FIXED64: 8, FIXED32: 4}.get(kind, 0)
        if kind == BYTES:
            size, place = _varint(data, place)
        if size > len(data) - place:
            raise ValueError("a field runs past its end")
        yield key >> 3, data[place : place + size]
        place += size


def _check_split(node: memoryview, file: str) -> None:
    """Raise ArtefactError for a node that says another number of outputs than it has.

    ONNX Runtime 1.32 ends the process over one.
    """
    fields = [*_fields(node)]
    outputs = sum(field == OUTPUT for field, _ in fields)
    attributes = (dict(_fields(v)) for f, v in fields if f == ATTRIBUTE and not isinstance(v, int))
    for own in attributes:
        name, said = own.get(NAME, b""), own.get(INTEGER, 0)
        if not isinstance(name, int) and name == SPLIT and said != outputs:
            raise ArtefactError(
                f"{file}: a node gives {outputs} outputs and says that it gives {said}; expected "
                f"the same number. {REBUILD}"
            )


def _varint(data: memoryview, place: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        byte = data[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
    raise ValueError("a number of more than ten bytes")


def _location(value: int | memoryview) -> str:
    """What a key and value of `external_data` say, in words."""
    if isinstance(value, int):
        return "its data location is external"
    return " = ".join(repr(bytes(v).decode(errors="replace")) for _, v in _fields(value) if v)


def _no_graph(file: str, reason: str) -> str:
    return f"{file}: is no ONNX graph ({reason}). {REBUILD}"
