"""The restricted unpickler: tensors come through, programs do not."""

from __future__ import annotations

import io
import os
import pickle
import struct
from collections import OrderedDict

import pytest
from moss_jt.convert import pickles
from moss_jt.convert.pickles import PickledTensor, Refused, Storage

from tests.checkpoints import ORDERED_DICT, REBUILD, Call, Global, Persistent, encode, pickled, tensor


def load(data: bytes) -> object:
    return pickles.load(io.BytesIO(data))


def test_tensors_dicts_and_parameters():
    plain = tensor("3", "HalfStorage", 40, 8, (4, 2), (2, 1))
    parameter = Call(Global("torch._utils", "_rebuild_parameter"), (plain, True, Call(ORDERED_DICT, ())))
    expected = PickledTensor(Storage("F16", "3", 40), 8, (4, 2), (2, 1))
    assert load(pickled({"a": plain, "b": parameter})) == {"a": expected, "b": expected}


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_of_every_protocol(protocol):
    data = {"a": [1, -1, 255, 70000, 1 << 40, None, True, False, 1.5, "字"], "b": (), "c": (1,), "d": (1, 2, 3, 4), "e": {}}
    assert load(pickle.dumps(data, protocol)) == data


def test_an_ordered_dict_with_attributes_is_a_dict():
    state = OrderedDict(a=1)
    state._metadata = OrderedDict(version=1)
    assert load(pickle.dumps(state, 2)) == {"a": 1}


def test_a_storage_that_is_part_of_another():
    place = Persistent(("storage", Global("torch", "FloatStorage"), "7", "cpu", 100, ("8", 10, 20)))
    call = Call(REBUILD, (place, 2, (3,), (1,), False, {}))
    assert load(pickled(call)) == PickledTensor(Storage("F32", "7", 100, 10), 12, (3,), (1,))


class Evil:
    """Pickles to a call of os.system that leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.system, (f"touch {self.trace}",)


def hostile(trace: str) -> dict[str, bytes]:
    """Pickles that would run code in an ordinary unpickler, each through another instruction."""
    command, string = f"touch {trace}", encode(f"touch {trace}")
    call, system = Global("os", "system"), encode(Global("os", "system"))
    inner = pickle.dumps(Evil(trace)).decode("latin-1")
    return {
        "REDUCE": pickle.dumps({"w": Evil(trace)}, 2),
        "REDUCE, protocol 0": pickle.dumps(Evil(trace), 0),
        "REDUCE, protocol 4": pickle.dumps({"w": Evil(trace)}, 4),
        "nested name": b"\x80\x04" + encode("os") + encode("path.os.system") + b"\x93" + encode((command,)) + b"R.",
        "builtins.eval": pickled(Call(Global("builtins", "eval"), (f"__import__('os').system({command!r})",))),
        "BUILD": b"\x80\x02" + encode(ORDERED_DICT) + b")R" + b"}(" + encode("__setstate__")
        + system + b"ub" + string + b"b.",
        "NEWOBJ": b"\x80\x02" + encode(Global("subprocess", "Popen")) + encode((command,)) + b"\x81.",
        "NEWOBJ of an allowed name": b"\x80\x02" + encode(ORDERED_DICT) + b")\x81.",
        "INST": b"(" + string + b"ios\nsystem\n.",
        "INST of an allowed name": b"(icollections\nOrderedDict\n.",
        "OBJ": b"(" + system + string + b"o.",
        "EXT1": b"\x80\x02\x82\x01" + encode((command,)) + b"R.",
        "_rebuild_from_type_v2": pickled(Call(Global("torch._tensor", "_rebuild_from_type_v2"), (call, call, (command,), {}))),
        "_load_from_bytes": pickled(Call(Global("torch.storage", "_load_from_bytes"), (inner,))),
        "a storage type that is none": pickled(Persistent(("storage", Global("os", "system"), "0", "cpu", 1))),
    }  # fmt: skip


@pytest.mark.parametrize("kind", hostile(""))
def test_programs_are_refused_and_not_run(kind, tmp_path):
    trace = tmp_path / "trace"
    with pytest.raises(Refused, match="nothing of it was run"):
        load(hostile(str(trace))[kind])
    assert not trace.exists()


def test_these_programs_do_run_in_an_ordinary_unpickler(tmp_path):
    """Otherwise the test above would prove nothing."""
    for kind in ("REDUCE", "REDUCE, protocol 4", "nested name", "builtins.eval", "BUILD", "INST", "OBJ"):
        trace = tmp_path / kind.replace(" ", "-")
        pickle.loads(hostile(str(trace))[kind])
        assert trace.exists(), kind


def test_the_message_names_the_forbidden_global():
    with pytest.raises(Refused, match=r"asks for subprocess\.Popen,"):
        load(hostile("")["NEWOBJ"])
    with pytest.raises(Refused, match=r"asks for torch\._tensor\._rebuild_from_type_v2,"):
        load(hostile("")["_rebuild_from_type_v2"])


@pytest.mark.parametrize("bad", [(-1, (2,), (1,)), (0, (-2,), (1,)), (0, (2,), (-1,)), (0, (1 << 70,), (1,))])
def test_negative_and_absurd_numbers(bad):
    with pytest.raises(Refused, match="negative or absurd"):
        load(pickled(tensor("0", "HalfStorage", 4, *bad)))


DEEP = b")" + b"\x85" * 100_000  # ((((…),),),): hashing or printing it overflows the C stack

DAMAGED = {
    "empty": b"",
    "no end": b"\x80\x02}",
    "stack empty": b"\x80\x02.",
    "two results": b"\x80\x02NN.",
    "no mark": b"\x80\x02Nt.",
    "memo missing": b"\x80\x02h\x05.",
    "items of no dict": b"\x80\x02N(NNu.",
    "odd items": b"\x80\x02}(Nu.",
    "number as key": b"\x80\x02}K\x01Ns.",
    "append to no list": b"\x80\x02}Na.",
    "call of a string": b"\x80\x02" + encode("x") + b")R.",
    "call with a list": b"\x80\x02" + encode(ORDERED_DICT) + b"]R.",
    "call of a storage": pickled(Call(Global("torch", "HalfStorage"), ())),
    "tensor without storage": pickled(Call(REBUILD, (None, 0, (), (), False, None))),
    "tensor with too few arguments": pickled(Call(REBUILD, (1,))),
    "shape and strides differ": pickled(tensor("0", "HalfStorage", 4, 0, (2, 2), (1,))),
    "persistent id of no storage": pickled(Persistent(("module", None, "0", "cpu", 4))),
    "persistent id of a dtype": pickled(Persistent(("storage", Global("torch", "float16"), "0", "cpu", 4))),
    "part beyond its storage": pickled(Persistent(("storage", Global("torch", "HalfStorage"), "0", "cpu", 4, ("1", 3, 2)))),
    "attributes of no dict": b"\x80\x02K\x01}b.",
    "not UTF-8": b"\x80\x02X\x01\x00\x00\x00\xff.",
    "string beyond the end": b"\x80\x02X\xff\x00\x00\x00abc.",
    "gigantic string": b"\x80\x02X" + struct.pack("<I", 0xFFFFFFFF) + b"abc.",
    "endless name": b"\x80\x02c" + b"a" * 5000,
    "deep tuple called": b"\x80\x02" + DEEP + b")R.",
    "deep tuple as a key": b"\x80\x02}" + DEEP + b"Ns.",
    "deep tuple as a name": b"\x80\x04" + DEEP + encode("x") + b"\x93.",
    "deep tuple as an id": b"\x80\x02" + DEEP + b"Q.",
    "name with an escape sequence": b"\x80\x02c\x1b[2Jos\nsystem\n.",
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damage_is_one_line(kind):
    with pytest.raises(Refused) as e:
        load(DAMAGED[kind])
    assert str(e.value).isprintable() and len(str(e.value)) < 200


def test_a_pickle_cannot_be_longer_than_any_checkpoint_needs(monkeypatch):
    monkeypatch.setattr(pickles, "LONGEST", 10_000)
    with pytest.raises(Refused, match="longer than"):
        load(b"\x80\x02" + b"N" * pickles.LONGEST)
    with pytest.raises(Refused, match="longer than"):
        load(b"\x80\x02" + b"]" * pickles.LONGEST)
