"""What an ONNX file may hold, checked on its bytes before any library parses them.

A bundle's graphs carry their weights. ONNX also lets a tensor name another file, which a library
would open: such a graph is refused, whatever that file's place. The bytes are walked as Protocol
Buffers, of which only the fields that lead to a tensor are followed.

Source of the field numbers: onnx.proto of ONNX 1.23.
"""

from collections.abc import Iterator, Mapping, Sequence

from runtime.bundle.manifest import REBUILD, GraphSpec
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
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5
MARKS = (b"location", bytes((DATA_LOCATION << 3 | VARINT, 1)))  # the key of a file, "external"


def check_self_contained(model: bytes, file: str) -> None:
    """Raise ArtefactError where `model` is no ONNX file or keeps a tensor in another one."""
    waiting = [("model", memoryview(model))]
    found = set()
    try:
        while waiting:
            message, data = waiting.pop()
            found.add(message)
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
