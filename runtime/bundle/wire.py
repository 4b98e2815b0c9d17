"""Protobuf's wire format: just enough to read and append to ONNX files without the `onnx` package.

A message is a sequence of fields, each a key varint (number << 3 | wire type) and a value:

    wire type 0  varint                     1  eight bytes          5  four bytes
              2  length varint, then bytes: a string, a packed list or another message

Two facts carry the design: unknown fields may be skipped, and the concatenation of two encoded messages is
their merge (lists append, embedded messages merge). Every length is checked before it is used.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

from mgg_edge.errors import BundleError

__all__ = ["Field", "Fields", "encode_bytes", "encode_field", "encode_integer"]

Field: TypeAlias = "tuple[int, int, int | memoryview]"
VARINT, EIGHT_BYTES, BYTES, FOUR_BYTES = 0, 1, 2, 5
MAX_VARINT_BYTES = 10
MAX_FIELD_NUMBER = (1 << 29) - 1
# The adaptation step of a ViT-Tiny has 13,000 fields; a file of 64 MiB could claim 3·10⁷ and stall the reader.
MAX_FIELDS = 300_000


class Fields:
    """Iterates over the fields of encoded messages, with one budget of fields for a whole file.

    Args:
        where: what is being read, for messages.

    Raises:
        BundleError: from `read` and its iterators: truncated, overlong, of an unknown wire type, or too many fields.
    """

    def __init__(self, where: str) -> None:
        self.where = where
        self._left = MAX_FIELDS

    def error(self, problem: str) -> BundleError:
        """An error that names the file being read."""
        return BundleError(f"{self.where}: {problem}; the graph is damaged or not ONNX, export the bundle again")

    def read(self, data: memoryview) -> Iterator[Field]:
        """Yield (number, wire type, value) of each field; values of types 1 and 5 are their raw bytes."""
        position, end = 0, len(data)
        while position < end:
            self._left -= 1
            if self._left < 0:
                raise self.error(f"expected at most {MAX_FIELDS} protobuf fields, found more")
            key, position = self._varint(data, position)
            number, wire_type = key >> 3, key & 7
            if not 1 <= number <= MAX_FIELD_NUMBER:
                raise self.error(f"expected a protobuf field number, found {number}")
            if wire_type == VARINT:
                value, position = self._varint(data, position)
                yield number, wire_type, value
                continue
            if wire_type == BYTES:
                length, position = self._varint(data, position)
            elif wire_type in (EIGHT_BYTES, FOUR_BYTES):
                length = 8 if wire_type == EIGHT_BYTES else 4
            else:
                raise self.error(f"expected protobuf wire type 0, 1, 2 or 5, found {wire_type}")
            if length > end - position:
                raise self.error(f"a protobuf field claims {length} bytes where {end - position} are left")
            yield number, wire_type, data[position : position + length]
            position += length

    def _varint(self, data: memoryview, position: int) -> tuple[int, int]:
        value = shift = 0
        for index in range(position, min(position + MAX_VARINT_BYTES, len(data))):
            byte = data[index]
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, index + 1
            shift += 7
        raise self.error("a protobuf number is truncated or too long")


def encode_integer(number: int, value: int) -> bytes:
    """Field `number` holding the integer `value` ≥ 0 as a varint."""
    return _varint(number << 3 | VARINT) + _varint(value)


def encode_bytes(number: int, *parts: bytes) -> bytes:
    """Field `number` holding the concatenation of `parts`: a string, raw bytes or an embedded message."""
    length = sum(map(len, parts))
    return b"".join((_varint(number << 3 | BYTES), _varint(length), *parts))


def encode_field(entry: Field) -> bytes:
    """A field as `Fields.read` gave it."""
    number, wire_type, value = entry
    if isinstance(value, int):
        return encode_integer(number, value)
    if wire_type == BYTES:
        return encode_bytes(number, bytes(value))
    return _varint(number << 3 | wire_type) + bytes(value)


def _varint(value: int) -> bytes:
    encoded = bytearray()
    while value >= 0x80:
        encoded.append(value & 0x7F | 0x80)
        value >>= 7
    encoded.append(value)
    return bytes(encoded)
