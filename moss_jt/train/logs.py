"""Logs of a training: a line of JSON for each step and evaluation, and TensorBoard's, where tensorboardX is installed."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from ..errors import MossError
from .loop import Evaluation, Position, Step

FILE = "metrics.jsonl"


class Logs:
    """Goes on with what is in ``folder`` up to ``position``; what was logged beyond, and then lost, is taken out."""

    def __init__(self, folder: Path, position: Position):
        path = folder / FILE
        try:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text("".join(_kept(path, position)), encoding="utf-8")
        except OSError as e:
            raise MossError(f"{path}: cannot be written: {e.strerror}") from None
        self._path = path
        self._board = _tensorboard(folder, position.step + 1)

    @property
    def has_tensorboard(self) -> bool:
        return self._board is not None

    def step(self, done: Step) -> None:
        self._write(asdict(done), "loss", "acc", "lr", "gradient_norm")

    def evaluating(self, done: int, batches: int) -> None:
        pass

    def evaluation(self, done: Evaluation) -> None:
        self._write(asdict(done), "val_loss", "val_acc")

    def close(self) -> None:
        if self._board is not None:
            self._board.close()

    def _write(self, record: dict[str, Any], *scalars: str) -> None:
        try:
            with open(self._path, "a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as e:
            raise MossError(f"{self._path}: cannot be written: {e.strerror}; what the last checkpoint has is safe") from None
        if self._board is not None:
            for name in scalars:
                self._board.add_scalar(name, record[name], record["step"])
            if "tokens" in record:
                self._board.add_scalar("tokens_per_second", record["tokens"] / record["seconds"], record["step"])


def _kept(path: Path, position: Position) -> list[str]:
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            record = json.loads(line)
            if record["step"] <= (position.evaluated if "val_loss" in record else position.step):
                kept.append(line)
        except (ValueError, KeyError, TypeError):  # cut short by a kill
            pass
    return kept


def _tensorboard(folder: Path, first: int) -> Any:
    """Its writer, from step ``first`` on; None where the library is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(folder), purge_step=first)
