from __future__ import annotations

import pytest

from moss_jt import MossError
from moss_jt.sizes import gib, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("6GiB", 6 << 30),
        ("6G", 6 << 30),
        ("6g", 6 << 30),
        (" 6 gib ", 6 << 30),
        ("0.5GiB", 1 << 29),
        (".5GiB", 1 << 29),
        ("1.5T", 3 << 39),
        ("6000MB", 6_000_000_000),
        ("6GB", 6_000_000_000),
        ("7kB", 7000),
        ("7K", 7168),
        ("512B", 512),
        ("12345", 12345),
        (12345, 12345),
        ("3896MiB", 3896 << 20),
    ],
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "GiB", "6 apples", "-6GiB", "6,5GiB", "6.5.1G", "0", "0.1B", "6GiBs", "1e9", "６GiB x", 0]
)
def test_what_is_no_size(text):
    with pytest.raises(MossError, match=r"is not a size: write it like 6GiB, 6G, 6000MB or 0\.5GiB$"):
        parse_size(text)


def test_written_for_people():
    assert [gib(6 << 30), gib(int(1.594 * 2**30)), gib(407 << 20), gib(0)] == ["6.00 GiB", "1.59 GiB", "407 MiB", "0 MiB"]
