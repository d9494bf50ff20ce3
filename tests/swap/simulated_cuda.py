"""The calls of moss_jt/cudart.py on a device in memory, whose streams run at random speeds beside each other: what is not
ordered by events happens in any order, and a copy's target holds garbage until its end."""

from __future__ import annotations

import random
import threading
import weakref
from collections import deque
from dataclasses import dataclass, field
from typing import Callable

import numpy as np

from moss_jt.cudart import OutOfDeviceMemory
from moss_jt.errors import MossError


@dataclass
class _Queue:
    """A stream: steps that are carried out in order. A step is tried again until it says that it is done."""

    steps: deque = field(default_factory=deque)


class Simulated:
    """In place of the module ``cudart``. ``seed``: of the streams' speeds. ``size``: bytes of the device's memory."""

    OutOfDeviceMemory = OutOfDeviceMemory

    def __init__(self, seed: int, size: int = 64 << 20):
        self.memory = np.full(size, 0xEE, np.uint8)
        self.written = np.zeros(size, np.uint8)  # of each byte, whether it is what somebody wrote there
        self._pinned: list[np.ndarray] = []
        self._lives: dict[int, int] = {0: 4096}  # what is allocated: where, and how much
        self.others = 0  # bytes that somebody else has taken
        self.refuses: Callable[[], bool] = lambda: False  # whether the next allocation fails
        self._random, self._lock = random.Random(seed), threading.RLock()
        self._slow = self._random.choice([None, 0, 1])  # a stream that hardly gets anywhere
        self.registers, self.slower = self._random.random() < 0.5, 1.0  # if memory is pinned where it is, and how slow that is
        self._default = _Queue()
        self._queues = [self._default]
        self.fails: Callable[[], bool] = lambda: False
        outer = self

        class Memory:
            def __init__(self, nbytes: int):
                self.pointer, self.nbytes = outer._allocate(nbytes), nbytes
                self.free = weakref.finalize(self, outer._free, self.pointer)

        class Stream(_Queue):
            def __init__(self):
                super().__init__()
                outer._queues.append(self)

            def wait(self, event) -> None:
                outer._put(self, event.ticket().passed)

            def synchronize(self) -> None:
                outer._until(lambda: not self.steps)

        class Event:
            """``last``: what was recorded last."""

            def __init__(self):
                self.last = None

            def ticket(self) -> _Ticket:
                return self.last or _Ticket(done=True)

            def record(self, stream=None) -> None:
                self.last = _Ticket()
                outer._put(stream or outer._default, self.last.pass_by)

            def wait_on_default(self) -> None:
                outer._put(outer._default, self.ticket().passed)

            def synchronize(self) -> None:
                outer._until(self.ticket().passed)

        class Managed(Memory):
            """A kernel always finds it right, wherever it is."""

            def __init__(self, nbytes: int):
                super().__init__(nbytes)
                self.bytes = outer.memory[self.pointer : self.pointer + nbytes]
                outer.written[self.pointer : self.pointer + nbytes] = 1
                outer.managed += nbytes

            def move(self, to_device: bool, stream) -> None:
                def step() -> bool:
                    (outer.on_device.add if to_device else outer.on_device.discard)(self)
                    outer.most_on_device = max(outer.most_on_device, sum(m.nbytes for m in outer.on_device))
                    return True

                outer._put(stream, step)

        self.managed, self.on_device, self.most_on_device = 0, set(), 0
        self.Memory, self.Managed, self.Stream, self.Event = Memory, Managed, Stream, Event

    @property
    def taken(self) -> int:
        return sum(self._lives.values())

    def _allocate(self, nbytes: int) -> int:
        """The first gap that is large enough."""
        nbytes, at = -(-max(1, nbytes) // 256) * 256, 0
        with self._lock:
            if self.refuses() or self.taken + nbytes > len(self.memory) - self.others:
                raise OutOfDeviceMemory("out of memory")
            for start, size in sorted(self._lives.items()):
                if start - at >= nbytes:
                    break
                at = start + size
            if at + nbytes > len(self.memory):
                raise OutOfDeviceMemory("out of memory")
            self._lives[at] = nbytes
        return at

    def _free(self, pointer: int) -> None:
        """As cudaFree: once all that was issued is over."""
        self.synchronize()
        with self._lock:
            size = self._lives.pop(pointer)
            self.memory[pointer : pointer + size], self.written[pointer : pointer + size] = 0xEE, 0

    def pinned(self, nbytes: int) -> np.ndarray:
        self._pinned.append(np.full(nbytes, 0xFF, np.uint8))  # not a number, in halves and floats
        return self._pinned[-1]

    def registered(self, memory: np.ndarray) -> np.ndarray:
        if not self.registers:
            raise MossError("not supported")
        assert not memory.flags.writeable
        self._pinned.append(memory)
        return memory

    def copy_seconds(self, memory, source: np.ndarray) -> float:
        assert memory.nbytes >= source.nbytes
        return source.nbytes * (self.slower if not source.flags.writeable else 1.0)

    def to_device(self, pointer: int, source: np.ndarray, stream=None) -> None:
        if stream and self.fails():
            raise RuntimeError("the copy cannot be started")
        raw = source.reshape(-1).view(np.uint8)
        if not any(np.may_share_memory(raw, memory) for memory in self._pinned):  # the caller may change it: it is taken now
            raw = raw.copy()
        self._copy(self._there(pointer, len(raw), len(raw), 1), raw[None], stream or self._default)

    def to_host(self, target: np.ndarray, pointer: int) -> None:
        self.until_default_is_idle()
        raw = target.reshape(-1).view(np.uint8)
        assert self.written[pointer : pointer + len(raw)].all(), "what is copied was never written"
        raw[:] = self.memory[pointer : pointer + len(raw)]

    def rows_to_device(self, pointer: int, pitch: int, source: np.ndarray, stream) -> None:
        self._copy(self._there(pointer, pitch, *source.shape[::-1]), source, stream)

    def rows_to_host(self, target: np.ndarray, pointer: int, pitch: int, stream) -> None:
        source, _ = self._there(pointer, pitch, *target.shape[::-1])
        self._copy((target, np.empty(target.shape, np.uint8)), source, stream)

    def _there(self, pointer: int, pitch: int, width: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows on the device, and of each of their bytes whether it was written."""
        strided = np.lib.stride_tricks.as_strided
        return tuple(strided(all_[pointer:], (count, width), (pitch, 1)) for all_ in (self.memory, self.written))

    def _copy(self, target: tuple[np.ndarray, np.ndarray], source: np.ndarray, queue: _Queue) -> None:
        there, written = target

        def begin() -> bool:
            there[:], written[:] = 0xEE, 0
            return True

        def end() -> bool:
            there[:], written[:] = source, 1
            return True

        self._put(queue, begin)
        self._put(queue, end)

    def memory_info(self) -> tuple[int, int]:
        return len(self.memory) - self.others - self.taken, len(self.memory)

    def launch(self, kernel: Callable[[], None]) -> None:
        """Put a kernel into the default stream."""
        self._put(self._default, lambda: kernel() or True)

    def until_default_is_idle(self) -> None:
        self._until(lambda: not self._default.steps)

    def use(self, pointer: int, expected: np.ndarray, wrong: list) -> None:
        """A kernel on the default stream that reads what must be ``expected`` all the time."""
        raw = np.ascontiguousarray(expected).reshape(-1).view(np.uint8).copy()

        def check() -> bool:
            if not np.array_equal(self.memory[pointer : pointer + len(raw)], raw):
                wrong.append(pointer)
            return True

        for _ in range(3):
            self._put(self._default, check)

    def synchronize(self) -> None:
        self._until(lambda: not any(queue.steps for queue in self._queues))

    def _put(self, queue: _Queue, step: Callable[[], bool]) -> None:
        with self._lock:
            queue.steps.append(step)
            for _ in range(self._random.randrange(4)):  # meanwhile the device goes on
                self._advance()

    def _advance(self) -> None:
        queue = self._random.choice(self._queues)
        if (
            self._slow is not None
            and queue is self._queues[min(self._slow, len(self._queues) - 1)]
            and self._random.random() < 0.98
        ):
            return
        if queue.steps and queue.steps[0]():
            queue.steps.popleft()

    def _until(self, done: Callable[[], bool]) -> None:
        for _ in range(1_000_000):
            with self._lock:
                if done():
                    return
                self._advance()
        raise AssertionError("the streams wait for each other")


@dataclass
class _Ticket:
    """A place in a stream that was recorded."""

    done: bool = False

    def pass_by(self) -> bool:
        self.done = True
        return True

    def passed(self) -> bool:
        return self.done
