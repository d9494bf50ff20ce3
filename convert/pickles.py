"""Reads torch's pickles without torch, and without running anything.

A pickle is a program for a small stack machine. This one knows the instructions that a checkpoint of tensors is made of
and the few names in ``_GLOBALS``; anything else is refused where it stands. Reference: Lib/pickletools.py in CPython.
"""

from __future__ import annotations

import pickletools
import struct
from dataclasses import dataclass
from typing import BinaryIO, Callable

LONGEST = 4 << 20  # bytes of one pickle; MOSS's are 50 kB. Bounds what a hostile one can make us hold

# The storages of torch, and the safetensors dtype of what is in them.
STORAGES = {
    "HalfStorage": "F16", "BFloat16Storage": "BF16", "FloatStorage": "F32", "DoubleStorage": "F64", "BoolStorage": "BOOL",
    "ByteStorage": "U8", "CharStorage": "I8", "ShortStorage": "I16", "IntStorage": "I32", "LongStorage": "I64",
}  # fmt: skip
_DTYPES = ("float16", "bfloat16", "float32", "float64", "bool", "uint8", "int8", "int16", "int32", "int64")


class Refused(Exception):
    """The pickle is damaged, or asks for what no checkpoint needs. The text says what, without the file's name."""


class Forbidden(Refused):
    """The pickle asks for a name that is not in ``_GLOBALS``."""


@dataclass(frozen=True)
class Global:
    """A name that the pickle may speak of. It is never imported: it only stands for itself."""

    module: str
    name: str


@dataclass(frozen=True)
class Storage:
    """One persistent id of torch: ``numel`` elements of ``dtype`` that the container holds under ``key``."""

    dtype: str
    key: str
    numel: int
    offset: int = 0  # elements; the legacy container's storages can be parts of others


@dataclass(frozen=True)
class PickledTensor:
    """A tensor's place in its storage. ``offset`` and ``strides`` count elements. Nothing here is checked against a file."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


_REBUILD = Global("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = Global("torch._utils", "_rebuild_parameter")
_ORDERED_DICT = Global("collections", "OrderedDict")
_GLOBALS = {
    _REBUILD, _PARAMETER, _ORDERED_DICT, Global("torch.storage", "UntypedStorage"),
    *(Global("torch", name) for name in (*STORAGES, *_DTYPES)),
}  # fmt: skip
_MARK = object()


def load(file: BinaryIO) -> object:
    """Run the next pickle of ``file``: dicts, lists, tuples, strings, numbers and PickledTensors. Raises Refused."""
    try:
        return _Machine(file).run()
    except (IndexError, KeyError, TypeError, ValueError, struct.error):
        raise Refused("its pickle is damaged") from None


class _Machine:
    def __init__(self, file: BinaryIO):
        self.file, self.left = file, LONGEST
        self.stack: list = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        while (op := self.read(1)) != b".":
            if op not in _OPS:
                raise Refused(
                    f"its pickle uses the instruction {_op_name(op)}, which no checkpoint needs; nothing of it was run"
                )
            _OPS[op](self)
        (result,) = self.stack
        return result

    def read(self, count: int) -> bytes:
        self.left -= count
        if self.left < 0:
            raise Refused(f"its pickle is longer than {LONGEST:,} bytes, which no checkpoint needs")
        data = self.file.read(count)
        if len(data) < count:
            raise Refused("its pickle is cut short")
        return data

    def number(self, code: str) -> int | float:
        return struct.unpack("<" + code, self.read(struct.calcsize("<" + code)))[0]

    def line(self) -> str:
        text = b""
        while (c := self.read(1)) != b"\n":
            text += c
            if len(text) > 1000:
                raise ValueError
        return text.decode()

    def push(self, value: object) -> None:
        self.stack.append(value)

    def pop_to_mark(self) -> list:
        at = len(self.stack) - 1
        while self.stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        items = self.stack[at + 1 :]
        del self.stack[at:]
        return items

    def push_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise IndexError
        items = tuple(self.stack[len(self.stack) - count :])
        del self.stack[len(self.stack) - count :]
        self.push(items)

    def push_global(self, module: str, name: str) -> None:
        found = Global(module, name)
        if not (module + name).isprintable():
            raise ValueError
        if found not in _GLOBALS:
            raise Forbidden(f"its pickle asks for {module}.{name}, which is no part of a tensor; nothing of it was run")
        self.push(found)

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise TypeError
        self.push_global(module, name)

    def refuse_instance(self) -> None:
        self.push_global(self.line(), self.line())
        raise Refused("its pickle makes an object of a class, which no checkpoint needs; nothing of it was run")

    def set_items(self, flat: list) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict) or len(flat) % 2 or not all(isinstance(k, str) for k in flat[::2]):
            raise TypeError
        target.update(zip(flat[::2], flat[1::2]))

    def append(self, items: list) -> None:
        if not isinstance(self.stack[-1], list):
            raise TypeError
        self.stack[-1].extend(items)

    def call(self) -> None:
        args, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, Global) or not isinstance(args, tuple):  # before hashing: deep tuples overflow the C stack
            raise TypeError
        self.push(_CALLS[function](*args))

    def build(self) -> None:
        self.stack.pop()  # an OrderedDict's attributes: torch keeps version numbers there
        if not isinstance(self.stack[-1], dict):
            raise TypeError

    def persistent(self) -> None:
        kind, storage, key, _device, numel, *view = self.stack.pop()
        if kind != "storage" or not isinstance(storage, Global) or not isinstance(key, str) or not _is_count(numel):
            raise TypeError
        dtype = "U8" if storage.name == "UntypedStorage" else STORAGES[storage.name]
        part = view[0] if view else None  # legacy only: (key, offset, numel) of a storage that is a part of another
        self.push(Storage(dtype, key, numel) if part is None else _part_of(dtype, key, numel, *part))


def _part_of(dtype: str, key: str, numel: int, _key: str, offset: int, count: int) -> Storage:
    if not _is_count(offset) or not _is_count(count) or offset + count > numel:
        raise ValueError
    return Storage(dtype, key, numel, offset)


def _tensor(storage: Storage, offset: int, shape: tuple, strides: tuple, *_grad_hooks_metadata: object) -> PickledTensor:
    numbers = (offset, *shape, *strides)
    if not isinstance(storage, Storage) or len(shape) != len(strides):
        raise TypeError
    if not all(_is_count(n) for n in numbers):
        raise Refused("a tensor in its pickle has a negative or absurd offset, size or stride")
    return PickledTensor(storage, storage.offset + offset, tuple(shape), tuple(strides))


def _parameter(data: PickledTensor, *_grad_hooks: object) -> PickledTensor:
    return data


def _dict() -> dict:
    return {}


def _is_count(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 62


def _op_name(op: bytes) -> str:
    known = pickletools.code2op.get(op.decode("latin-1"))
    return known.name if known else op.hex()


_CALLS: dict[object, Callable] = {_REBUILD: _tensor, _PARAMETER: _parameter, _ORDERED_DICT: _dict}

_OPS: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m.read(1) and None,  # PROTO
    b"\x95": lambda m: m.read(8) and None,  # FRAME
    b"(": lambda m: m.push(_MARK),
    b"N": lambda m: m.push(None),
    b"\x88": lambda m: m.push(True),
    b"\x89": lambda m: m.push(False),
    b"K": lambda m: m.push(m.number("B")),
    b"M": lambda m: m.push(m.number("H")),
    b"J": lambda m: m.push(m.number("i")),
    b"\x8a": lambda m: m.push(int.from_bytes(m.read(m.number("B")), "little", signed=True)),  # LONG1
    b"G": lambda m: m.push(struct.unpack(">d", m.read(8))[0]),  # BINFLOAT
    b"X": lambda m: m.push(m.read(m.number("I")).decode()),  # BINUNICODE
    b"\x8c": lambda m: m.push(m.read(m.number("B")).decode()),  # SHORT_BINUNICODE
    b"}": lambda m: m.push({}),
    b"]": lambda m: m.push([]),
    b")": lambda m: m.push(()),
    b"t": lambda m: m.push(tuple(m.pop_to_mark())),
    b"\x85": lambda m: m.push_tuple(1),
    b"\x86": lambda m: m.push_tuple(2),
    b"\x87": lambda m: m.push_tuple(3),
    b"s": lambda m: m.set_items([m.stack.pop(-2), m.stack.pop()]),
    b"u": lambda m: m.set_items(m.pop_to_mark()),
    b"a": lambda m: m.append([m.stack.pop()]),
    b"e": lambda m: m.append(m.pop_to_mark()),
    b"q": lambda m: m.memo.__setitem__(m.number("B"), m.stack[-1]),  # BINPUT
    b"r": lambda m: m.memo.__setitem__(m.number("I"), m.stack[-1]),  # LONG_BINPUT
    b"\x94": lambda m: m.memo.__setitem__(len(m.memo), m.stack[-1]),  # MEMOIZE
    b"h": lambda m: m.push(m.memo[m.number("B")]),
    b"j": lambda m: m.push(m.memo[m.number("I")]),
    b"c": lambda m: m.push_global(m.line(), m.line()),
    b"\x93": lambda m: m.stack_global(),
    b"i": lambda m: m.refuse_instance(),  # INST
    b"R": lambda m: m.call(),
    b"b": lambda m: m.build(),
    b"Q": lambda m: m.persistent(),
}
