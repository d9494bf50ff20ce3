"""Reading whole pages: past the page cache or not, errors of the disk, the thread that does it; what is cut out of a file."""

from __future__ import annotations

import errno
import gc
import os
import re
import threading
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moss_jt import MossError
from moss_jt.swap import parts, reader
from moss_jt.swap.host import Rows
from moss_jt.swap.reader import File, Worker, allocate
from moss_jt.weights.layout import ALIGN, BITS, PANEL, Tensor, matrix
from moss_jt.weights.store import Region

SIZE = 3 * ALIGN + 1234


@pytest.fixture
def content(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    return path


def read(file: File, offset: int = 0, nbytes: int | None = None) -> bytes:
    nbytes = SIZE - offset if nbytes is None else nbytes
    memory = allocate(parts.pages(nbytes))
    file.read(offset, memory, nbytes)
    return memory[:nbytes].tobytes()


@pytest.mark.parametrize("nbytes", [1, ALIGN, SIZE - ALIGN])
def test_pages_of_the_cache(content, nbytes):
    """What is mapped is the file's, cannot be written to, and outlives the file's being closed."""
    file = File(content)
    memory = file.mapped(ALIGN, nbytes)
    file.close()
    assert memory.tobytes() == content.read_bytes()[ALIGN : ALIGN + nbytes] and not memory.flags.writeable


def test_a_file_that_is_too_short_to_be_mapped(content):
    file = File(content)
    os.truncate(content, 2 * ALIGN)
    with pytest.raises(MossError, match="cannot be mapped") as e:
        file.mapped(ALIGN, SIZE - ALIGN)
    assert str(content) in str(e.value) and "\n" not in str(e.value)


def refused_when_opened(monkeypatch):
    def refuse(path, flags, *rest):
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, "Invalid argument")
        return os_open(path, flags, *rest)

    os_open = os.open
    monkeypatch.setattr(reader.os, "open", refuse)


def refused_when_read(monkeypatch):
    """A file system that takes the flag, and refuses its first read."""
    calls = []

    def refuse(*arguments):
        calls.append(1)
        if len(calls) == 1:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(*arguments)

    preadv = os.preadv
    monkeypatch.setattr(reader.os, "preadv", refuse)


def a_page_at_a_time(monkeypatch):
    preadv = os.preadv
    monkeypatch.setattr(reader.os, "preadv", lambda fd, buffers, offset: preadv(fd, [buffers[0][:ALIGN]], offset))


@pytest.mark.parametrize("system", [lambda _: None, refused_when_opened, refused_when_read, a_page_at_a_time])
def test_what_is_read(content, system, monkeypatch):
    expected = content.read_bytes()
    system(monkeypatch)
    file = File(content)
    assert read(file) == expected
    assert read(file, ALIGN) == expected[ALIGN:]
    assert read(file, 2 * ALIGN, ALIGN) == expected[2 * ALIGN : 3 * ALIGN]
    file.close()


def test_past_the_page_cache_where_that_is_possible(content):
    try:
        os.close(os.open(content, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system has no O_DIRECT")
    file = File(content)
    flags = re.search(r"^flags:\s*(\d+)", Path(f"/proc/self/fdinfo/{file._file}").read_text(), re.M)[1]
    assert int(flags, 8) & os.O_DIRECT


@pytest.mark.parametrize("code", [errno.EIO, errno.EINVAL])
def test_errors_of_the_disk(content, code, monkeypatch):
    def fail(*_):
        raise OSError(code, os.strerror(code))

    file = File(content)
    monkeypatch.setattr(reader.os, "preadv", fail)
    with pytest.raises(MossError, match=f"^{content}: cannot be read: {os.strerror(code)}$"):
        read(file)


def test_a_file_that_became_shorter(content):
    file = File(content)
    os.truncate(content, ALIGN + 7)
    with pytest.raises(MossError, match=rf"{content}: ends at byte {ALIGN + 7}: it was changed"):
        read(file)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(MossError, match="none: cannot be opened: No such file"):
        File(tmp_path / "none")


def open_files() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


def test_files_are_closed(content, monkeypatch):
    gc.collect()  # what other tests left open
    before = open_files()
    file = File(content)
    assert len(open_files()) > len(before)
    file.close()
    file.close()
    assert open_files() == before
    refused_when_read(monkeypatch)
    read(File(content))  # opened twice, and closed with the object
    gc.collect()
    assert open_files() == before


def test_memory_is_aligned_and_given_back():
    memory = allocate(64 << 20)
    assert memory.ctypes.data % ALIGN == 0 and len(memory) == 64 << 20
    memory[:] = 1

    def resident() -> int:
        return int(re.search(r"RssAnon:\s*(\d+)", Path("/proc/self/status").read_text())[1]) << 10

    full = resident()
    del memory
    assert resident() < full - (60 << 20)


def test_rows(tmp_path):
    table = np.random.default_rng().standard_normal((50, 7)).astype(np.float16)
    path = tmp_path / "wte"
    path.write_bytes(bytes(ALIGN) + table.tobytes())
    rows = Rows(Region(path, ALIGN, table.nbytes, (Tensor("wte.weight", "F16", table.shape),)))
    ids = np.array([3, 49, 0, 3])
    assert np.array_equal(rows.read(ids), table[ids].astype(np.float32)) and rows.read(ids[:0]).shape == (0, 7)
    os.truncate(path, ALIGN + 14 * 20 + 3)
    assert np.array_equal(rows.read(np.array([19])), table[[19]])
    with pytest.raises(MossError, match="ends before row 20: it was changed"):
        rows.read(np.array([0, 20]))


# ---- the thread -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def worker():
    before = threading.active_count()
    worker = Worker("test")
    yield worker
    worker.close()
    assert threading.active_count() == before


def test_one_after_the_other_in_order(worker):
    running, done = [], []

    def task(i):
        running.append(i)
        time.sleep(0.001)
        assert running.pop() == i and not running
        done.append(i)
        return -i

    futures = [worker.start(task, i) for i in range(10)]
    assert [f.result(5) for f in futures] == [-i for i in range(10)] and done == list(range(10))


def test_errors_belong_to_their_task(worker):
    wrong, right = worker.start(lambda: 1 / 0), worker.start(lambda: 2)
    assert isinstance(wrong.exception(5), ZeroDivisionError) and right.result(5) == 2


def test_what_was_cancelled_is_left_out(worker):
    gate, done = threading.Event(), []
    first, second, third = worker.start(gate.wait, 5), worker.start(done.append, 2), worker.start(done.append, 3)
    assert second.cancel()
    gate.set()
    assert first.result(5) and third.result(5) is None and done == [3]


def test_close_leaves_out_what_has_not_begun_and_waits_for_what_has():
    worker, begun, done = Worker("test"), threading.Event(), []

    def slow():
        begun.set()
        time.sleep(0.05)
        done.append(1)

    worker.start(slow)
    rest = [worker.start(done.append, 2) for _ in range(3)]
    begun.wait(5)
    worker.close()
    assert done == [1] and all(f.cancelled() for f in rest)
    worker.close()
    with pytest.raises(RuntimeError, match="test has ended"):
        worker.start(print)


def test_it_keeps_nothing_alive_that_it_is_done_with(worker):
    class Thing:
        def __call__(self):
            pass

    thing = Thing()
    alive = weakref.ref(thing)
    worker.start(thing).result(5)
    del thing
    worker.start(time.sleep, 0).result(5)
    assert alive() is None


# ---- parts ------------------------------------------------------------------------------------------------------------------


@given(st.data())
def test_rows_are_cut_out_exactly(data):
    """Read in whole pages into whole pages, the rows are where the part says."""
    bits = data.draw(st.sampled_from(list(BITS)))
    n, k = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 200))
    tensors = [
        Tensor("ln_f.weight", "F32", (k,)),
        *matrix("lm_head.weight", n, k, bits),
        Tensor("lm_head.bias", "F32", (n,)),
    ]
    file = np.random.default_rng(0).integers(0, 256, sum(t.nbytes for t in tensors), np.uint8)
    first = PANEL * data.draw(st.integers(0, n // PANEL))
    end = min(n, first + PANEL * data.draw(st.integers(0, n // PANEL + 1)))
    part = parts.rows(tensors, "lm_head.weight", first, end)
    names = []
    for span in part.spans:
        assert span.offset % ALIGN == 0 and span.room % ALIGN == 0 and span.room - ALIGN < span.nbytes <= span.room
        (tensor,) = span.tensors
        whole = next(t for t in tensors if t.name == tensor.name)
        at = sum(t.nbytes for t in tensors[: tensors.index(whole)])
        together = 1 if whole.name == "lm_head.weight" else PANEL
        a, b = first // together, -(-end // together)
        rows = file[at : at + whole.nbytes].reshape(whole.shape[0], -1)[a:b]
        assert file[span.offset : span.offset + span.nbytes][span.shift :].tobytes() == rows.tobytes()
        assert tensor.shape == (b - a, *whole.shape[1:]) and tensor.dtype == whole.dtype
        names.append(tensor.name)
    assert names == [t.name for t in tensors if t.name.startswith("lm_head.weight")]
    assert part.room <= parts.room_for_rows(tensors, "lm_head.weight", end - first)
    room = data.draw(st.integers(0, 1 << 20))
    assert parts.room_for_rows(tensors, "lm_head.weight", parts.rows_that_fit(tensors, "lm_head.weight", room)) <= max(
        room, parts.room_for_rows(tensors, "lm_head.weight", 0)
    )
