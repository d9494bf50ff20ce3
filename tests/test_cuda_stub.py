"""All of CUDA but the kernels themselves: a toolkit whose libraries are stubs, in which device memory is host memory.

Where MOSS_CUDA_STUB names its folder: Jittor's core is compiled for it the first time, which takes minutes.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from moss_jt.swap import make_plan, smallest

from .swap import models

STUB = Path(os.environ.get("MOSS_CUDA_STUB", "/nonexistent"))
pytestmark = pytest.mark.skipif(
    not (STUB / "bin/nvcc").exists(), reason="needs a toolkit folder of stubs, which MOSS_CUDA_STUB names"
)

KERNEL = r"""
#include <cuda_fp16.h>
namespace moss_cuda {
__global__ void twice(const float* x, float* y, int n) {
    int i = blockIdx.x * blockDim.x + threadIdx.x;
    if (i < n) y[i] = 2 * x[i];
}
inline void launch_twice(const float* x, float* y, int n, cudaStream_t stream) {
    twice<<<(n + 255) / 256, 256, 0, stream>>>(x, y, n);
}
}
"""

# An op with both bodies over a numpy array that is used in place. Marks say what the lines of the log that follow belong to.
PROGRAM = r"""
import importlib.util, json, os, sys
from pathlib import Path
import numpy as np
import moss_jt

here = Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("moss_jt.kernels_cuda", here / "__init__.py")
sys.modules["moss_jt.kernels_cuda"] = importlib.util.module_from_spec(spec)
from moss_jt import cuda, runtime
from moss_jt.ops import kernel

jt = runtime.jittor("cuda")
answer = {"cuda": jt.has_cuda, "nvcc": jt.flags.nvcc_path, "use_cuda": jt.flags.use_cuda}
answer["device"] = cuda.driver().devices[0].name

def mark(text):
    with open(os.environ["MOSS_STUB_LOG"], "a") as log:
        log.write(f"--- {text}\n")

def op(x, both=True):
    cpu = 'for (int i = 0; i < out_shape0; i++) out_p[i] = 3 * in0_p[i] + data["plus"];'
    device = ("twice.cuh", "moss_cuda::launch_twice(in0_p, out_p, in0_shape0, 0);")
    return kernel.run("simd.h", x.shape, [x], cpu, device if both else None, plus=1.0)

values = np.arange(100_000, dtype=np.float32)
x = jt.core.reuse_np_array(values)
with jt.flag_scope(use_cuda=0, lazy_execution=0):
    mark("host")
    answer["host"] = op(x).numpy()[:3].tolist()
    answer["shared"] = x.raw_ptr == values.ctypes.data
with jt.flag_scope(use_cuda=1, lazy_execution=0):
    mark("device")
    y = op(x)
    mark("device again")
    y = op(x)
    mark("host body")
    z = op(x, both=False)
    mark("to numpy")
    z.numpy()
mark("array")
answer["kept"] = bool((values == np.arange(100_000)).all())
answer["shared after"] = x.raw_ptr == values.ctypes.data
mark("lazy")
with jt.flag_scope(use_cuda=1):
    op(op(op(jt.array(values)))).sync(True)
mark("cub")
with jt.flag_scope(use_cuda=1):
    jt.compile_extern.cub_ops.cub_cumsum(jt.array(values[None])).sync(True)
mark("end")
print(json.dumps(answer))
"""


@pytest.fixture(scope="module")
def done(tmp_path_factory):
    """What the program answers, and for each of its marks the lines that the stubs wrote."""
    folder = tmp_path_factory.mktemp("stub")
    (folder / "__init__.py").touch()
    (folder / "twice.cuh").write_text(KERNEL)
    log = folder / "log"
    env = {**os.environ, "LD_LIBRARY_PATH": str(STUB / "lib64"), "nvcc_path": str(STUB / "bin/nvcc"), "MOSS_STUB_LOG": str(log)}
    command = [sys.executable, "-c", PROGRAM, str(folder)]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 0
    parts = re.split(r"^--- (.+)\n", log.read_text(), flags=re.MULTILINE)
    return json.loads(ran.stdout.splitlines()[-1]), dict(zip(parts[1::2], parts[2::2]))


def test_jittor_has_cuda(done):
    answer, _ = done
    assert answer["cuda"] == 1 and answer["use_cuda"] == 0 and answer["device"].startswith("stub sm_")
    assert "/moss-jt-cuda/" in answer["nvcc"]


def test_the_host_computes_on_the_array_itself(done):
    answer, log = done
    assert answer["host"] == [1.0, 4.0, 7.0] and answer["shared"]
    assert "copy" not in log["host"] and "launch" not in log["host"]


def test_the_device_gets_a_copy_once(done):
    """cudaMemcpyKind 1 is to the device, 2 to the host."""
    answer, log = done
    assert "copy kind 1 400000\n" in log["device"] and log["device"].count("launch") == 1
    assert "copy" not in log["device again"] and log["device again"].count("launch") == 1
    assert answer["kept"] and not answer["shared after"]


def test_a_host_body_amid_the_device_s_work(done):
    """Its input comes back, its result goes there."""
    _, log = done
    assert "copy kind 2 400000\n" in log["host body"] and "copy kind 1 400000\n" in log["host body"]
    assert "launch" not in log["host body"] and "copy kind 2 400000\n" in log["to numpy"]


def test_several_ops_and_one_of_jittor_s_own(done):
    _, log = done
    assert log["lazy"].count("launch") == 3 and log["cub"].count("launch") == 1


# ---- a model -----------------------------------------------------------------------------------------------------------------

MODEL = r"""
import gc, json, os, sys
import numpy as np
from moss_jt import cudart, devices
from moss_jt.devices import check, open_device
from moss_jt.model import Model, Request
from moss_jt.sampling import Sampling
from moss_jt.swap import on_device, speeds
from moss_jt.swap.plan import Speeds
from moss_jt.weights import open_weights

def mark(text):
    with open(os.environ["MOSS_STUB_LOG"], "a") as log:
        log.write(f"--- {text}\n")

check.check = lambda *what: None  # kernels do nothing here
on_device._AS_FAST = float("inf")  # copies are the host's, as fast as they happen to be
weights = open_weights(sys.argv[1])
vram, ram = (int(size) if size != "None" else None for size in sys.argv[2:4])
# A token is computed by the CPU, and some are not.
speeds.measured, devices.link_bandwidth = (lambda *which: Speeds(1e12, 1e9, 1e11)), (lambda: 10e9)
mark("import")
from moss_jt.runtime import jittor
jittor("cuda", save_mem=sys.argv[4] == "jittor")
before = cudart.memory_info()[0]
mark("load")
device = open_device(weights, 64, ram, kv_cache="int8", device="cuda", vram=vram, swap=sys.argv[4])
model = Model(weights, 64, kv_cache="int8", device=device)
ids, greedy = np.arange(20), Sampling(greedy=True)
mark("prompt")
(logits,) = model.logits(ids)
mark("token")
((one,),) = model.evaluate([Request(model.sequence, np.arange(21), 1, greedy)])
mark("token again")
model.evaluate([Request(model.sequence, np.arange(22), 1, Sampling(seed=0))])
mark("many rows")
rows = model.logits(np.arange(30, 55), 20)
mark("batch")
cache = model.cache(3)
batch = model.evaluate([Request(s, ids[: 5 + s.place], 2, greedy) for s in cache.sequences])
mark("freed")
peak, plan, streams, disk = device.peak, device.plan, model.streams, len(device.weights.from_disk)
used = cudart.memory_info()[0]
blocks_on_disk = sum(isinstance(item, int) for item in device.weights.from_disk)
del model, device, cache
gc.collect()
mark("end")
print(json.dumps({
    "logits": list(logits.shape), "one": [type(one).__name__, list(one.ids.shape)], "batch": [len(b) for b in batch],
    "rows": list(rows.shape), "freed": cudart.memory_info()[0] - used, "peak": peak, "planned": plan.peak, "streams": streams,
    "streamed": plan.streamed_blocks, "host": plan.host_blocks, "kept": plan.kept, "from": plan.streams_from,
    "ranges": plan.head_ranges(), "slot": plan.slot, "disk": disk, "blocks on disk": blocks_on_disk,
}))
"""


def run_model(weights, vram=None, ram=None, swap="stream") -> tuple[dict, dict]:
    """What the program answers, and for each of its marks what the stubs wrote."""
    log = weights.folder.parent / "log"
    log.unlink(missing_ok=True)
    env = {**os.environ, "LD_LIBRARY_PATH": str(STUB / "lib64"), "nvcc_path": str(STUB / "bin/nvcc"), "MOSS_STUB_LOG": str(log)}
    command = [sys.executable, "-c", MODEL, str(weights.folder), str(vram), str(ram), swap]
    ran = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True)
    assert ran.returncode == 0
    parts = re.split(r"^--- (.+)\n", log.read_text(), flags=re.MULTILINE)
    return json.loads(ran.stdout.splitlines()[-1]), dict(zip(parts[1::2], parts[2::2]))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """1.5 MB a block, beside which what a page takes is little."""
    sizes = {"n_embd": 512, "n_head": 4, "n_layer": 6}
    return models.write(tmp_path_factory.mktemp("stub-model") / "model", "int4", "int8", **sizes)


@pytest.fixture(scope="module")
def resident(weights):
    return run_model(weights)


def copied(log: str, kind: int) -> list[int]:
    return [int(size) for size in re.findall(rf"copy kind {kind} (\d+)", log)]


def test_a_model_s_weights_go_to_the_device_once(weights, resident):
    answer, log = resident
    held = sum(region.nbytes for name, region in weights.regions.items() if name != "wte.safetensors")
    assert held <= sum(copied(log["load"], 1)) < 1.05 * held
    assert sum(copied(log["prompt"] + log["token"] + log["token again"], 1)) < 10_000
    assert answer["freed"] > held and not answer["streams"] and answer["disk"] == 0


def test_a_token_is_issued_at_once_and_little_comes_back(weights, resident):
    answer, log = resident
    assert answer["logits"] == [2100] and answer["rows"] == [20, 2100] and answer["batch"] == [2, 2, 2]
    assert answer["one"] == ["Likeliest", [1]]
    for part, enough in (("token", 1), ("token again", 40)):
        assert copied(log[part], 2) == [2 * enough * 4]  # the likeliest tokens and their logits
        assert 4 * weights.config.n_layer < log[part].count("launch") < 8 * weights.config.n_layer + 12
        assert "malloc" not in log[part] and "pinned" not in log[part]


@pytest.mark.parametrize("ram", [None, 6 << 20], ids=["pinned", "some from disk"])
def test_streamed(weights, ram):
    """Each streamed part is one copy a sweep, on a stream of its own; a slot's next copy waits for the kernels that read it,
    and kernels wait for its copy."""
    least = smallest(weights.config, weights.coding, 64, "int8", gpu=True)
    answer, log = run_model(weights, least + 2_000_000, ram)
    assert answer["streams"] and answer["streamed"] and answer["peak"] <= answer["planned"] <= least + 2_000_000
    assert (answer["disk"] > 0) == (ram is not None)
    # Blocks are pinned where they are, in their files' pages; of lm_head there are several pieces, so that it is copied.
    sizes = [weights.regions[f"block-{i:02d}.safetensors"].nbytes for i in answer["streamed"]][answer["blocks on disk"] :]
    assert re.findall(r"^register (\d+)", log["load"], flags=re.MULTILINE) == [str(size) for size in sizes]
    both, expected = log["token"] + log["token again"], 2 * (len(answer["streamed"]) + len(answer["ranges"]))
    over = re.findall(r"copy kind 1 (\d+) stream (0x[0-9a-f]+)", both)
    assert len({stream for _, stream in over}) == 1 and all(int(size) <= answer["slot"] for size, _ in over)
    ahead = 0 if ram is None else 2  # a thread may be that far ahead, or behind, when the log is marked
    for count in (len(over), both.count(f"wait stream {over[0][1]}"), both.count("wait stream (nil)")):
        assert abs(count - expected) <= ahead
    assert "malloc" not in both and "pinned" not in both


def crossed(log: str, kind: int) -> list[int]:
    """Bytes of each copy of rows of keys and values."""
    return [int(size) for size in re.findall(rf"copy2d kind {kind} (\d+)", log)]


@pytest.mark.parametrize("swap", ["host", "auto"])
def test_blocks_that_the_cpu_computes(weights, swap):
    """For a token its state goes to the device after each run of them, and nothing else; kernels are launched for the other
    blocks only: with auto for those, too, that the slots keep, whose new keys and values go back."""
    if b"cudaMemcpy2DAsync" not in (STUB / "lib64/libcudart.so").read_bytes():
        pytest.skip("the stub has no cudaMemcpy2DAsync")
    how = ("int8", True, swap)
    least = smallest(weights.config, weights.coding, 64, *how)
    plans = (make_plan(weights.config, weights.coding, 64, least + i * 400_000, *how) for i in range(50))
    plan = next(plan for plan in plans if 1 < len(plan.host_blocks) - len(plan.kept) < 4 and not plan.head_ranges())
    answer, log = run_model(weights, plan.budget, swap=swap)
    blocks, n = len(answer["host"]), weights.config.n_layer
    assert blocks == len(plan.host_blocks) and answer["peak"] <= answer["planned"] == plan.peak
    assert answer["host"] == plan.host_blocks and answer["streamed"] == (answer["host"] if swap == "auto" else [])
    assert answer["kept"] == plan.kept == ([0, 1] if swap == "auto" else [])
    assert answer["streams"] is False and answer["disk"] == 0 and answer["one"] == ["Likeliest", [1]]
    by_cpu = [i for i in answer["host"] if i not in answer["kept"]]
    state, runs = 4 * weights.config.n_embd, sum(i - 1 not in by_cpu for i in by_cpu)
    assert 1 <= runs <= (1 if swap == "host" else -(-len(by_cpu) // 2))
    row = weights.config.cache_bytes_per_token("int8") // n
    for part, before in (("token", 20), ("token again", 0)):
        assert copied(log[part], 1).count(state) == runs and sum(copied(log[part], 1)) <= runs * state + 4 * 64
        assert copied(log[part], 2).count(state) == runs - (0 in by_cpu)
        assert sum(crossed(log[part], 1)) == before * row * len(plan.kept)  # others had their turns in the prompt
        assert sum(crossed(log[part], 2)) == row * len(plan.kept)
        assert 4 * (n - len(by_cpu)) < log[part].count("launch") < 8 * (n - len(by_cpu)) + 12
        assert "malloc" not in log[part] and "pinned" not in log[part]
    if swap == "host":
        assert state * 20 in copied(log["prompt"], 1) and crossed(log["prompt"], 1) == []
        return
    # 20 tokens are more than a sweep of the CPU may have; nothing was there before, so new rows go back and none come.
    assert 2 <= answer["from"] <= 20
    assert crossed(log["prompt"], 1) == [] and sum(crossed(log["prompt"], 2)) == 20 * row * blocks
    weights_of = [size for size in copied(log["prompt"], 1) if size > 1_000_000]
    assert blocks - 2 <= len(weights_of) <= blocks + 2 and max(weights_of) <= answer["slot"]


def test_unified_memory(weights):
    """Pages of each streamed part are moved to the device ahead of its use, and those of another back."""
    if b"cudaMemPrefetchAsync" not in (STUB / "lib64/libcudart.so").read_bytes():
        pytest.skip("the stub has no cudaMemPrefetchAsync")
    least = smallest(weights.config, weights.coding, 64, "int8", True, "unified")
    answer, log = run_model(weights, least + 2_000_000, swap="unified")
    parts = [*answer["streamed"], *map(tuple, answer["ranges"])]
    assert answer["streams"] and parts and log["load"].count("managed") == len(parts)
    assert log["load"].count("advise") == 2 * len(parts)
    both = log["token"] + log["token again"]
    moved = re.findall(r"prefetch (\d+) location (\d) 0 stream (\w+)", both)
    assert [where for _, where, _ in moved] == ["2", "1"] * (2 * len(parts)) and len({stream for _, _, stream in moved}) == 1
    assert max(copied(both, 1)) < 100_000 and "managed" not in both


# ---- Jittor's own swapping ---------------------------------------------------------------------------------------------------

# Device memory is the host's here, so that an op's host code can look at what Jittor brought.
LENT = r"""
import json, sys
import numpy as np
from moss_jt.runtime import jittor
from moss_jt.swap import make_plan
from moss_jt.swap.by_jittor import ByJittor
from moss_jt.weights import open_weights

jt = jittor("cuda", save_mem=True)
weights = open_weights(sys.argv[1])
plan = make_plan(weights.config, weights.coding, 64, int(sys.argv[2]), gpu=True, swap="jittor")
lender = ByJittor(weights, plan, 0)
most, seen, where = 0, [], []
for sweep in range(3):
    for item, source in lender._sources.items():
        where.append(lender.moved(item).location())
        with jt.flag_scope(use_cuda=1, lazy_execution=1, no_grad=1):
            copy = "memcpy(out_p, in0_p, 4 * in0_shape0);"
            found = jt.code(lender.moved(item).shape, "float32", [lender.moved(item)], cuda_src=copy).numpy()
        expected = np.zeros(4 * len(found), np.uint8)
        source.fetch(expected)
        seen.append(found.tobytes() == expected.tobytes())
        del found
        most = max(most, jt.get_mem_info().total_cuda_used)
print(json.dumps({"seen": seen, "where": where, "most": most, "limit": jt.flags.device_mem_limit, "slot": plan.slot}))
"""


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """14 MB a block."""
    sizes = {"n_embd": 768, "n_head": 4, "n_layer": 6}
    return models.write(tmp_path_factory.mktemp("stub-model") / "larger", **sizes)


def test_jittor_keeps_its_limit_and_every_byte(larger):
    least = smallest(larger.config, larger.coding, 64, gpu=True, swap="jittor")
    env = {**os.environ, "LD_LIBRARY_PATH": str(STUB / "lib64"), "nvcc_path": str(STUB / "bin/nvcc")}
    command = [sys.executable, "-c", LENT, str(larger.folder), str(least + (16 << 20))]
    answer = json.loads(subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert all(answer["seen"]) and len(answer["seen"]) == 3 * 7
    assert set(answer["where"][:7]) == {"cpu"} and set(answer["where"][7:]) == {"cpu", "device"}
    assert 2 * answer["slot"] < answer["most"] <= answer["limit"]


def test_jittor_moves_a_model(larger):
    """Of 7 parts 3 are there at a time; the others, and one more, come and go for every token."""
    least = smallest(larger.config, larger.coding, 64, "int8", True, "jittor")
    answer, log = run_model(larger, least + (16 << 20), swap="jittor")
    assert answer["streams"] and answer["streamed"] == list(range(6)) and len(answer["ranges"]) == 1
    both = log["token"] + log["token again"]
    for kind in (1, 2):
        moved = [size for size in copied(both, kind) if size > 1 << 20]
        assert len(moved) == 2 * (7 - 3 + 1) and max(moved) <= answer["slot"]
