"""Damage to files, as hypothesis draws it: of bytes, and of what checksums and lengths would show.

A file's form says how it is taken apart, so that what is damaged inside of it comes behind a right
checksum, a right length or a right hash, and reaches the parsers behind those.
"""

import copy
import gzip
import io
import json
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import onnx
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]
Damage = Callable[[Draw, bytes], bytes]
BYTES = (0, 1, 0x7F, 0x80, 0xFE, 0xFF)
NUMBERS = (0, -1, 1, 2, 255, 1 << 16, 1 << 31, (1 << 63) - 1, 1 << 64, 10**40)
# What JSON can hold in a place where something else is expected.
VALUES: tuple[Any, ...] = (
    *(None, True, False, "", "a", "../a", "a" * 5000, "\0", "\ud800", "1", [], {}, [[]], {"a": 1}),
    *(0.5, -0.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf")),
    *NUMBERS,
)
LONGEST_RUN = 64


@dataclass(frozen=True)
class Sample:
    """A whole file, and how it is taken apart: a name in FORMS."""

    data: bytes
    form: str = "bytes"


@st.composite
def damaged(draw: Draw, sample: Sample) -> bytes:
    """The file with its bytes damaged, or what is inside of them."""
    inside = FORMS[sample.form]
    if inside is of_bytes or draw(st.integers(0, 3)) == 0:
        return of_bytes(draw, sample.data)
    return inside(draw, sample.data)


def of_bytes(draw: Draw, data: bytes) -> bytes:
    """Bits flipped, bytes set, runs cut, doubled, spliced and put in, up to four times."""
    own = bytearray(data)
    for _ in range(draw(st.integers(1, 4))):
        place, kind = draw(places(len(own))), draw(st.sampled_from(KINDS))
        end = place + draw(st.integers(1, LONGEST_RUN))
        if kind == "flip" and own[place:end]:
            own[place] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and own[place:end]:
            own[place] = draw(st.sampled_from(BYTES))
        elif kind == "end":
            del own[place:]
        elif kind == "cut":
            del own[place:end]
        elif kind == "double":
            own[place:place] = own[place:end]
        elif kind == "splice":
            source = draw(places(len(own)))
            own[place:end] = own[source : source + end - place]
        else:
            own[place:place] = draw(st.binary(min_size=1, max_size=16))
    return bytes(own)


KINDS = ("flip", "set", "end", "cut", "double", "splice", "put")


def places(size: int) -> st.SearchStrategy[int]:
    """A place in a file, as often in its first kilobyte as anywhere."""
    return st.integers(0, min(size, 1024)) | st.integers(0, size)


def of_json(draw: Draw, data: bytes) -> bytes:
    """A value replaced, removed, moved, doubled or renamed, up to twice; or text that is none."""
    content = json.loads(data)
    for _ in range(draw(st.integers(1, 2))):
        found = [*spots(content)]
        if not found:
            return json.dumps(draw(st.sampled_from(VALUES))).encode()
        parent, key = draw(st.sampled_from(found))
        kind = draw(st.sampled_from(("replace", "replace", "near", "remove", "move", "name")))
        if kind == "remove":
            del parent[key]
        elif kind == "move":
            other, name = draw(st.sampled_from(found))
            parent[key] = copy.deepcopy(other[name])
        elif kind == "near" and isinstance(parent[key], int | float):
            parent[key] += draw(st.sampled_from((-1, 1, 0.5, 1 << 20)))
        elif kind == "name":
            put(parent, draw(st.sampled_from(("x", "", "\0", "__metadata__", "format"))), key)
        else:
            parent[key] = copy.deepcopy(draw(st.sampled_from(VALUES)))
    return json.dumps(content).encode()


def spots(content: Any) -> Iterator[tuple[Any, Any]]:
    """Where JSON has a value: the list or dictionary that holds it, and its key there."""
    if not isinstance(content, dict | list):
        return
    for key in content if isinstance(content, dict) else range(len(content)):
        yield content, key
        yield from spots(content[key])


def put(parent: Any, name: str, key: Any) -> None:
    """A value under another name too; an item of a list once more."""
    if isinstance(parent, dict):
        parent[name] = parent[key]
    else:
        parent.append(parent[key])


def of_text(draw: Draw, data: bytes) -> bytes:
    """Of JSON its values, of other text its bytes."""
    return of_json(draw, data) if data[:1] == b"{" else of_bytes(draw, data)


def of_safetensors(draw: Draw, data: bytes) -> bytes:
    """The header, or a text in its metadata, with its length put right; the tensors as they are."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    metadata = header.get("__metadata__", {})
    name = draw(st.sampled_from([None, *metadata]))
    if name is None:
        text = of_json(draw, data[8:end])
    else:
        metadata[name] = of_text(draw, metadata[name].encode()).decode("utf-8", "replace")
        text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[end:]


def of_zip(draw: Draw, data: bytes) -> bytes:
    """Members with right checksums: one damaged, gone, or under another name."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = draw(st.sampled_from([*members]))
    kind = draw(st.sampled_from(("damage", "damage", "damage", "gone", "moved", "other")))
    if kind == "damage":
        members[name] = of_member(draw, members[name])
    elif kind == "other":
        members[name] = members[draw(st.sampled_from([*members]))]
    else:
        gone = members.pop(name)
        members |= {"../a.npy": gone} if kind == "moved" else {}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for key, value in members.items():
            archive.writestr(key, value)
    return file.getvalue()


def of_member(draw: Draw, data: bytes) -> bytes:
    """Of an array of JSON the JSON, its length put right; of others the bytes."""
    start = data.find(b"\n") + 1
    body, header = data[start:], data[:start]
    if not data.startswith(b"\x93NUMPY") or body[:1] != b"{" or draw(st.booleans()):
        return of_bytes(draw, data)
    wide = b"<U" in header  # four bytes a letter, else UTF-8 as uint8
    text = of_json(draw, body.decode("utf-32-le").encode() if wide else body)
    count = len(text.decode())
    packed = text.decode().encode("utf-32-le") if wide else text
    described = f"<U{count}" if wide else "|u1"
    shape = "()" if wide else f"({len(text)},)"
    own = f"{{'descr': '{described}', 'fortran_order': False, 'shape': {shape}, }}\n".encode()
    return b"\x93NUMPY\1\0" + struct.pack("<H", len(own)) + own + packed


def of_png(draw: Draw, data: bytes) -> bytes:
    """Chunks with right checksums: one damaged, in its packed pixels or text too, gone, doubled."""
    chunks, place = [], 8
    while place < len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        chunks.append((kind, data[place + 8 : place + 8 + length]))
        place += 12 + length
    index = draw(st.integers(0, len(chunks) - 1))
    kind, body = chunks[index]
    way = draw(st.sampled_from(("inside", "inside", "bytes", "gone", "doubled", "moved")))
    if way == "inside":
        chunks[index] = kind, of_chunk(draw, kind, body)
    elif way == "bytes":
        chunks[index] = kind, of_bytes(draw, body)
    else:
        del chunks[index]
        for _ in range({"gone": 0, "doubled": 2, "moved": 1}[way]):
            chunks.insert(draw(st.integers(0, len(chunks))), (kind, body))
    made = [data[:8]]
    for kind, body in chunks:
        made += [struct.pack(">I", len(body)), kind, body]
        made.append(struct.pack(">I", zlib.crc32(kind + body)))
    return b"".join(made)


def of_chunk(draw: Draw, kind: bytes, body: bytes) -> bytes:
    """What a chunk holds, damaged behind its packing."""
    if kind == b"IDAT":
        return zlib.compress(of_bytes(draw, zlib.decompress(body)))
    if kind == b"tEXt":
        key, _, text = body.partition(b"\0")
        return key + b"\0" + of_text(draw, text)
    return of_bytes(draw, body)


def of_gzip(draw: Draw, data: bytes) -> bytes:
    """What is packed, packed again."""
    return gzip.compress(of_bytes(draw, gzip.decompress(data)), 1)


def of_onnx(draw: Draw, data: bytes) -> bytes:
    """A field of some message replaced, an item of a list gone, doubled or another's; up to twice.

    What comes is a graph by its bytes, and may be none by what they say.
    """
    model = onnx.load_model_from_string(data)
    for _ in range(draw(st.integers(1, 2))):
        message, field, value = draw(st.sampled_from([*fields(model)]))
        if field.is_repeated:
            index = draw(st.integers(0, len(value) - 1))
            others = [value[draw(st.integers(0, len(value) - 1))] for _ in range(2)]
            kept = [*value[:index], *others[: draw(st.integers(0, 2))], *value[index + 1 :]]
            if field.message_type is None and draw(st.booleans()):
                kept[index:] = [scalar(draw, field), *kept[index:]]
            copies = (
                [own.__class__.FromString(own.SerializeToString()) for own in kept]
                if (field.message_type)
                else kept
            )
            message.ClearField(field.name)
            getattr(message, field.name).extend(copies)
        else:
            setattr(message, field.name, scalar(draw, field))
    return model.SerializeToString()


def fields(message: Any) -> Iterator[tuple[Any, Any, Any]]:
    """Every field that a message and those in it have: (message, field, value)."""
    for field, value in message.ListFields():
        if field.message_type is None or field.is_repeated:
            yield message, field, value
        if field.message_type is not None:
            for inner in value if field.is_repeated else [value]:
                yield from fields(inner)


def scalar(draw: Draw, field: Any) -> Any:
    """A value of a field's own type."""
    kind = field.cpp_type
    if kind == field.CPPTYPE_STRING:
        text = draw(st.sampled_from(("", "x", "a" * 5000, "Loop", "If", "Reshape", "MatMul")))
        return text.encode() if field.type == field.TYPE_BYTES else text
    if kind in (field.CPPTYPE_FLOAT, field.CPPTYPE_DOUBLE):
        return draw(st.sampled_from((0.0, -1.0, 1e38, float("nan"), float("inf"))))
    if kind == field.CPPTYPE_ENUM:
        return draw(st.sampled_from([value.number for value in field.enum_type.values]))
    most = (1 << 31) - 1 if kind == field.CPPTYPE_INT32 else (1 << 63) - 1
    return draw(st.sampled_from((0, 1, 2, 7, 16, 1000, 1 << 20, most)) | st.integers(-3, 40))


FORMS: dict[str, Damage] = {
    "bytes": of_bytes,
    "json": of_json,
    "safetensors": of_safetensors,
    "zip": of_zip,
    "png": of_png,
    "gzip": of_gzip,
    "onnx": of_onnx,
}
