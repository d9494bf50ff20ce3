"""Random damage: a conversion either works or is refused in one line; nothing else is raised, and nothing runs."""

from __future__ import annotations

import random
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from moss_jt import MossError, convert
from moss_jt.weights import open_weights
from tests.checkpoints import random_state, small_config, write_official

CONFIG = small_config(n_layer=1)
STATE = random_state(CONFIG)
TIMES = 60


def damaged(data: bytes, rng: random.Random, interesting: list[range]) -> bytes:
    """One to three changes: a byte, a number, a cut, or a piece that is lost, doubled or moved."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        where = rng.choice(interesting)
        at = min(rng.choice(where), max(len(changed) - 1, 0))
        kind = rng.randrange(6)
        if kind == 0:
            changed[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and changed:
            changed[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            changed[at : at + 8] = struct.pack("<q", rng.choice([0, 1, -1, 255, 1 << 31, 1 << 40, (1 << 63) - 1]))
        elif kind == 3:
            del changed[at : at + rng.randint(1, 40)]
        elif kind == 4:
            changed[at:at] = changed[at : at + rng.randint(1, 40)]
        else:
            del changed[at : at + 1 if rng.random() < 0.7 else None]
    return bytes(changed)


def headers(path: Path, data: bytes) -> list[range]:
    """Where a container's own words are: most damage to the numbers changes nothing but numbers."""
    if path.suffix == ".safetensors":
        return [range(8 + struct.unpack("<Q", data[:8])[0]), range(len(data))]
    if data.startswith(b"PK"):
        return [range(data.index(b"archive/byteorder")), range(data.index(b"PK\x01\x02"), len(data)), range(len(data))]
    return [range(data.index(b"X\x01\x00\x00\x000]") if b"X\x01\x00\x00\x000]" in data else len(data) // 2), range(len(data))]


def outcome(src: Path, dst: Path) -> str:
    shutil.rmtree(dst, ignore_errors=True)
    shutil.rmtree(dst.with_name(dst.name + ".partial"), ignore_errors=True)
    try:
        convert.weights(src, dst)
    except MossError as e:
        assert "\n" not in str(e) and len(str(e)) < 1000
        return "refused"
    for file in (open_weights(dst).wte(), open_weights(dst).block(0), open_weights(dst).head()):
        assert all(np.isfinite(x).all() for x in file.values())
    return "converted"


@pytest.mark.parametrize("container", ["zip", "legacy", "safetensors"])
def test_shards(tmp_path, container):
    src = write_official(tmp_path / "src", CONFIG, STATE, container, masks=False)
    (path,) = src.glob("*model.*")
    data = path.read_bytes()
    interesting = headers(path, data)
    rng = random.Random(container)
    seen = set()
    for _ in range(TIMES):
        path.write_bytes(damaged(data, rng, interesting))
        seen.add(outcome(src, tmp_path / "dst"))
    assert seen == {"refused", "converted"}


SMALL = ["config.json", "pytorch_model.bin.index.json", "vocab.json", "merges.txt", "added_tokens.json"]


@pytest.mark.parametrize("name", SMALL)
def test_small_files(tmp_path, name):
    src = write_official(tmp_path / "src", CONFIG, STATE, shards=2, masks=False)
    data = (src / name).read_bytes()
    rng = random.Random(name)
    for _ in range(TIMES // 3):
        (src / name).write_bytes(damaged(data, rng, [range(len(data))]))
        outcome(src, tmp_path / "dst")


def test_converted_files(tmp_path):
    src = write_official(tmp_path / "src", CONFIG, STATE)
    ours = convert.weights(src, tmp_path / "ours")
    rng = random.Random(0)
    for path in sorted(ours.glob("*.safetensors")):
        data = path.read_bytes()
        for _ in range(TIMES // 3):
            path.write_bytes(damaged(data, rng, [range(400)]))
            try:
                open_weights(ours)
            except MossError as e:
                assert str(e).isprintable()
        path.write_bytes(data)
    open_weights(ours)
