"""One shard at a time: whole ones are read wherever their tensors lie, broken ones are refused in one line."""

from __future__ import annotations

import io
import struct
import zipfile

import numpy as np
import pytest
from moss_jt.convert.torchfile import open_torch
from moss_jt.convert.view import cast, contiguous

from moss_jt import MossError
from moss_jt.weights.header import read_header
from tests.checkpoints import legacy_container, pickled, store, tensor, torch_legacy, torch_zip, zip_container

STATE = {"a": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.arange(5, dtype=np.float32) - 2}


def stored(dtype: str = "fp16") -> dict:
    return {name: store(x, dtype) for name, x in STATE.items()}


def opened(tmp_path, data: bytes):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(data)
    return open_torch(path)


def refused(tmp_path, data: bytes) -> str:
    """The one line with which a shard is refused, without its path."""
    with pytest.raises(MossError) as e:
        opened(tmp_path, data)
    text = str(e.value)
    assert text.startswith(str(tmp_path / "pytorch_model.bin: ")) and text.isprintable()
    return text.split(".bin: ", 1)[1]


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
def test_tensors_are_read(tmp_path, write, dtype):
    views = opened(tmp_path, write(stored(dtype)))
    assert list(views) == ["a", "b"]
    for name, x in STATE.items():
        np.testing.assert_array_equal(cast(views[name].read(), views[name], "F32"), x)


@pytest.mark.parametrize("compression", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_compressed_entries(tmp_path, compression):
    bomb = zip_container(
        pickled({"w": tensor("0", "HalfStorage", 1 << 20, 0, (1 << 20,), (1,))}), {"0": bytes(2 << 20)}, compression
    )
    assert len(bomb) < 20_000  # it would grow a hundredfold
    assert "compressed" in refused(tmp_path, bomb)


@pytest.mark.parametrize("write", [torch_zip, torch_legacy])
@pytest.mark.parametrize("keep", [0, 1, 7, 20, 100, 0.5, 0.9, -1])
def test_cut_short(tmp_path, write, keep):
    data = write(stored())
    cut = data[: int(len(data) * keep) if isinstance(keep, float) else keep]
    refused(tmp_path, cut)


def test_cut_short_says_so(tmp_path):
    assert "cut short" in refused(tmp_path, torch_zip(stored())[:-30])
    assert "cut short: storage '1' needs 10 bytes, the file ends after 9" in refused(tmp_path, torch_legacy(stored())[:-1])


def test_bytes_after_the_last_legacy_storage(tmp_path):
    assert "3 bytes follow" in refused(tmp_path, torch_legacy(stored()) + b"abc")


def test_flipped_pickle_byte_is_found_by_its_checksum(tmp_path):
    data = bytearray(torch_zip(stored()))
    data[data.index(b"X\x01\x00\x00\x00a") + 5] = ord("c")  # the tensor's name: still a fine pickle
    assert "checksum" in refused(tmp_path, bytes(data))


def test_a_checksum_that_torch_left_out_is_not_missed(tmp_path):
    data = torch_zip(stored())
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        crc = struct.pack("<I", z.getinfo("archive/data.pkl").CRC)
    assert list(opened(tmp_path, data.replace(crc, bytes(4)))) == ["a", "b"]


@pytest.mark.parametrize(
    ("what", "numel", "offset", "shape", "strides", "says"),
    [
        ("storage smaller than its pickle says", 25, 0, (4, 6), (6, 1), "has 48 bytes, its pickle says 50"),
        ("storage larger than its pickle says", 23, 0, (4, 5), (5, 1), "has 48 bytes, its pickle says 46"),
        ("tensor larger than its storage", 24, 0, (5, 6), (6, 1), "[5, 6] reaches beyond its storage of 24"),
        ("offset pushes it out", 24, 1, (4, 6), (6, 1), "reaches beyond"),
        ("offset alone is out", 24, 25, (), (), "reaches beyond"),
        ("stride pushes it out", 24, 0, (2, 2), (23, 1), "reaches beyond"),
        ("gigantic", 24, 0, (1 << 40, 1 << 40), (1 << 40, 1), "reaches beyond"),
        ("negative stride", 24, 5, (6,), (-1,), "negative"),
        ("negative offset", 24, -1, (6,), (1,), "negative"),
    ],
)
def test_tensor_and_storage_disagree(tmp_path, what, numel, offset, shape, strides, says):
    pickle = pickled({"w": tensor("0", "HalfStorage", numel, offset, shape, strides)})
    assert says in refused(tmp_path, zip_container(pickle, {"0": bytes(48)})), what


def test_shared_and_strided_storages(tmp_path):
    base = np.arange(24, dtype=np.float16)
    placed = {
        "rows": (6, (3, 6), (6, 1), base.reshape(4, 6)[1:]),
        "columns": (2, (4, 3), (6, 1), base.reshape(4, 6)[:, 2:5]),
        "transposed": (0, (6, 4), (1, 6), base.reshape(4, 6).T),
        "expanded": (3, (5, 2), (0, 1), np.broadcast_to(base[3:5], (5, 2))),
        "diagonal": (0, (4,), (7,), base.reshape(4, 6).diagonal()),
        "number": (23, (), (), base[23]),
        "nothing": (24, (0, 3), (3, 1), np.zeros((0, 3))),
    }
    pickle = pickled({name: tensor("0", "HalfStorage", 24, o, shape, s) for name, (o, shape, s, _) in placed.items()})
    views = opened(tmp_path, zip_container(pickle, {"0": base.tobytes()}))
    for name, (*_, expected) in placed.items():
        np.testing.assert_array_equal(views[name].read(), expected, err_msg=name)


def test_legacy_storages_that_are_parts_of_others(tmp_path):
    whole = tensor("0", "FloatStorage", 24, 0, (24,), (1,), legacy=True)
    part = tensor("0", "FloatStorage", 24, 1, (2,), (1,), legacy=True)
    view = b"(X\x01\x00\x00\x00vK\x04K\x06t"  # ("v", 4, 6): 6 elements from the 4th
    data = pickled({"part": part, "whole": whole}).replace(b"NtQ", view + b"tQ", 1)
    views = opened(tmp_path, legacy_container(data, {"0": (24, np.arange(24, dtype=np.float32).tobytes())}))
    np.testing.assert_array_equal(views["part"].read(), [5, 6])


def test_missing_storage(tmp_path):
    pickle = pickled({"w": tensor("5", "HalfStorage", 4, 0, (4,), (1,))})
    assert "storage '5' of tensor w is missing" in refused(tmp_path, zip_container(pickle, {"0": bytes(8)}))
    assert "no tensor uses its storage '0'" in refused(tmp_path, legacy_container(pickle, {"0": (4, bytes(8))}))


@pytest.mark.parametrize("value", [None, [], {}, 3, "x", {"epoch": 3}, {"model": {"w": 1}}])
def test_what_is_no_dict_of_tensors(tmp_path, value):
    assert "tensor" in refused(tmp_path, zip_container(pickled(value), {}))


@pytest.mark.parametrize("value", [None, [], 3, {"epoch": 3}])
def test_what_is_no_dict_of_tensors_in_a_legacy_file(tmp_path, value):
    assert "tensor" in refused(tmp_path, legacy_container(pickled(value), {}))


def test_tensor_names_cannot_control_a_terminal(tmp_path):
    pickle = pickled({"\x1b[2J": tensor("0", "HalfStorage", 4, 0, (4,), (1,))})
    refused(tmp_path, zip_container(pickle, {"0": bytes(8)}))


def test_big_endian(tmp_path):
    data = zip_container(pickled({}), {}).replace(b"little", b"big   ")
    assert "big-endian" in refused(tmp_path, fix_checksums(data))
    data = torch_legacy(stored()).replace(b"little_endian\x88", b"little_endian\x89")
    assert "big-endian" in refused(tmp_path, data)


def fix_checksums(data: bytes) -> bytes:
    """Leave the checksums out, as torch can."""
    with zipfile.ZipFile(io.BytesIO(data)) as z:
        for info in z.infolist():
            data = data.replace(struct.pack("<I", info.CRC), bytes(4))
    return data


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "git lfs pull"),
        (b"<!DOCTYPE html><html>", "neither a torch checkpoint nor"),
        (b"PK\x03\x04" + bytes(100), "zip directory"),
        (b"cos\nsystem\n(S'true'\ntR.", "os.system"),
        (b"", "neither"),
    ],
)
def test_what_is_no_checkpoint(tmp_path, content, says):
    assert says in refused(tmp_path, content)


def test_a_zip_of_something_else(tmp_path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as z:
        z.writestr("hello.txt", "hello")
    assert "no data.pkl" in refused(tmp_path, out.getvalue())


def test_an_entry_twice(tmp_path):
    out = io.BytesIO(torch_zip(stored()))
    with zipfile.ZipFile(out, "a") as z, pytest.warns(UserWarning):
        z.writestr("archive/data/0", bytes(48))
    assert "twice" in refused(tmp_path, out.getvalue())


def test_zip64_with_storages_beyond_4_gib(tmp_path):
    """A sparse file: 4 GiB of nothing that take no disk, then what is to be read."""
    path = tmp_path / "big.bin"
    hole, x = (1 << 32) + 4096, np.arange(8, dtype=np.float16)
    names = {"hole": tensor("0", "ByteStorage", hole, hole - 1, (1,), (1,)), "x": tensor("1", "HalfStorage", 8, 0, (8,), (1,))}
    with open(path, "wb") as f:
        places = [(b"archive/data/0", f.tell(), hole)]
        f.write(local_header(b"archive/data/0"))
        f.seek(hole, 1)
        for name, data in ((b"archive/data/1", x.tobytes()), (b"archive/data.pkl", pickled(names))):
            places.append((name, f.tell(), len(data)))
            f.write(local_header(name) + data)
        f.write(zip64_directory(places, f.tell()))
    assert path.stat().st_blocks * 512 < 1 << 20
    views = open_torch(path)
    np.testing.assert_array_equal(views["x"].read(), x)
    assert views["hole"].read() == [0] and views["x"].start > 1 << 32


def local_header(name: bytes) -> bytes:
    return b"PK\x03\x04" + struct.pack("<5H3L2H", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), 0) + name


def zip64_directory(places: list[tuple[bytes, int, int]], start: int) -> bytes:
    """APPNOTE.TXT 4.3.12 to 4.3.16, with every size and place in the zip64 field."""
    entries = b""
    for name, at, size in places:
        extra = struct.pack("<HHQQQ", 1, 24, size, size, at)
        fixed = struct.pack(
            "<6H3L5H2L", 45, 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, len(name), len(extra), 0, 0, 0, 0, 0xFFFFFFFF
        )
        entries += b"PK\x01\x02" + fixed + name + extra
    n, end = len(places), start + len(entries)
    record = b"PK\x06\x06" + struct.pack("<QHHLLQQQQ", 44, 45, 45, 0, 0, n, n, len(entries), start)
    locator = b"PK\x06\x07" + struct.pack("<LQL", 0, end, 1)
    return entries + record + locator + b"PK\x05\x06" + struct.pack("<4H2LH", 0, 0, n, n, 0xFFFFFFFF, 0xFFFFFFFF, 0)


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(bytes(100))
    with pytest.raises(MossError, match="cut short while it was read"):
        contiguous("w", path, "F16", (60,), 0).read()
    path.unlink()
    with pytest.raises(MossError, match="cannot be read: No such file"):
        contiguous("w", path, "F16", (60,), 0).read()


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity(tmp_path, dtype, bad):
    x = np.zeros((3, 4), np.float32)
    x[1, 2] = bad
    view = opened(tmp_path, torch_zip({"h.w": store(x, dtype)}))["h.w"]
    for target in ("F16", "F32"):
        with pytest.raises(MossError, match=r"tensor h\.w holds (NaN|infinity)"):
            cast(view.read(), view, target)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_too_large_for_fp16(tmp_path, dtype):
    x = np.full((2, 2), -65536, np.float32)
    view = opened(tmp_path, torch_zip({"w": store(x, dtype)}))["w"]
    with pytest.raises(MossError, match="tensor w holds -65536, beyond fp16's largest number 65504"):
        cast(view.read(), view, "F16")
    np.testing.assert_array_equal(cast(view.read(), view, "F32"), x)


def test_every_finite_fp16_and_only_those(tmp_path):
    bits = np.arange(1 << 16, dtype=np.uint16)
    finite = bits[np.isfinite(bits.view(np.float16))]
    view = opened(tmp_path, torch_zip({"w": ("fp16", finite.view(np.float16))}))["w"]
    np.testing.assert_array_equal(cast(view.read(), view, "F16").view(np.uint16), finite)
    np.testing.assert_array_equal(cast(view.read(), view, "F32").astype(np.float16).view(np.uint16), finite)


# ---- safetensors ------------------------------------------------------------------------------------------------------------


def safetensors(header: str | bytes, data: bytes = b"", length: int | None = None) -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype: str = "F16", shape: str = "[2]", offsets: str = "[0,4]") -> str:
    return f'{{"w":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}'


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "cut short"),
        (b"\x08\x00", "cut short"),
        (safetensors("{}", length=1 << 60), "not a safetensors file"),
        (safetensors("{", b"1234"), "header is damaged"),
        (safetensors(b"\xff\xfe", b"1234"), "header is damaged"),
        (safetensors("[" * 100_000), "header is damaged"),
        (safetensors("[1]"), "header is damaged"),
        (safetensors('{"w":3}'), "header is damaged"),
        (safetensors('{"w":{"dtype":"F16"}}'), "header is damaged"),
        (safetensors(entry(shape="[2.0]"), b"1234"), "header is damaged"),
        (safetensors(entry(shape="[-2]"), b"1234"), "header is damaged"),
        (safetensors(entry(shape='"2"'), b"1234"), "header is damaged"),
        (safetensors(entry(offsets="[0]"), b"1234"), "header is damaged"),
        (safetensors(entry(dtype="F8_E4M3"), b"1234"), "dtype 'F8_E4M3'"),
        (safetensors(entry(shape="[3]"), b"1234"), "w does not lie where"),
        (safetensors(entry(offsets="[2,6]"), b"123456"), "w does not lie where"),
        (safetensors(entry(), b"123"), "its header says"),
        (safetensors(entry(), b"12345"), "its header says"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
    ],
)
def test_broken_safetensors(tmp_path, content, says):
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with pytest.raises(MossError) as e:
        read_header(path)
    assert says in str(e.value) and str(e.value).isprintable()
