"""What each measured program shares: it starts, says ``ready``, and then takes a sample for each line that it is sent.

Started with a JSON object as its argument (see peers.py); needs nothing but the standard library.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any, Callable


def asked() -> dict:
    """What to measure: the sizes of the model, how its weights are stored, threads, tokens in the cache, a folder to use."""
    return json.loads(sys.argv[1])


def serve(samples: dict[str, Callable[..., float]], **facts: Any) -> None:
    """Tell the facts, then answer each line, a name and its arguments, with a number, until there are no more."""
    print(json.dumps(facts), flush=True)
    for line in sys.stdin:
        name, *arguments = line.split()
        print(samples[name](*map(int, arguments)), flush=True)


def rate(work: Callable[[], Any], amount: float, seconds: float = 0.3) -> float:
    """Call ``work``, which does ``amount`` of something, for this long, once at least; returns the amount a second."""
    start, done = time.perf_counter(), 0.0
    while True:
        work()
        done += amount
        elapsed = time.perf_counter() - start
        if elapsed >= seconds:
            return done / elapsed
