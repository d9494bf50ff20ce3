"""Fine-tuning, from its settings to its result."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ..convert.job import source_record
from ..errors import MossError
from ..tokenizer import load_tokenizer
from ..weights import Weights, open_weights
from .checkpoints import Checkpoints
from .data import Conversations, read_conversations
from .logs import Logs
from .loop import Position, Training, Watcher
from .result import Adapter, Progress, Whole
from .settings import Settings


@dataclass(frozen=True)
class Prepared:
    """What is known before anything is computed."""

    settings: Settings
    weights: Weights
    train: Conversations
    val: Conversations | None  # None: there is no val.jsonl
    checkpoints: Checkpoints


def prepare(settings: Settings) -> Prepared:
    """Open and check everything, without Jittor. Raises MossError for the first thing that is wrong."""
    weights = open_weights(settings.model_name_or_path)
    if not settings.lora and not weights.coding.is_fp16:
        raise MossError(
            f"{weights.folder}: is in {weights.coding}, whose weights cannot be trained; take the model in fp16, or train an "
            "adapter with --lora_rank"
        )
    tokenizer, limit = load_tokenizer(weights.folder), min(settings.max_seq_len, weights.config.n_ctx)
    paths = {name: settings.data_dir / f"{name}.jsonl" for name in ("train", "val")}
    train = read_conversations(paths["train"], tokenizer, limit, settings.skip_bad)
    val = read_conversations(paths["val"], tokenizer, limit, settings.skip_bad) if paths["val"].exists() else None
    record = {
        **settings.deciding,
        "model": source_record([region.path for region in weights.regions.values()]),
        "train.jsonl": train.digest,
    }
    return Prepared(settings, weights, train, val, Checkpoints(settings.output_dir, record, settings.keep))


def run(
    prepared: Prepared,
    watchers: Iterable[Watcher] = (),
    saved: Callable[[Path], None] = lambda path: None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    began: Callable[[Begun], None] = lambda begun: None,
) -> Path:
    """Train, from the last checkpoint if there is one, and return the result's folder.

    ``began``: told of the training before its first step. ``saved``: told of each checkpoint. ``stopping``: asked between
    batches. ``progress``: of writing the result, in bytes. Raises loop.Stopped where it was asked to stop, MossError for
    what the user can mend.
    """
    settings, checkpoints = prepared.settings, prepared.checkpoints
    with checkpoints.locked():
        if settings.resume is False:
            checkpoints.clear()
        last = checkpoints.latest()
        if settings.resume and last is None:
            raise MossError(f"{settings.output_dir}: holds no checkpoint to resume from")
        trainee, optimizer = make(prepared)
        base, parameters = prepared.weights, trainee.parameters
        trained = Adapter(base, settings.lora, parameters) if settings.lora else Whole(base.folder, parameters, settings.dtype)
        position = checkpoints.load(last, trained, optimizer) if last else Position()
        trainee.dropout_state = position.dropout_state
        checkpoints.check_room(trained, optimizer)
        logs = Logs(settings.logs, position)

        def save(position: Position) -> None:
            saved(checkpoints.save(position, trained, optimizer))

        try:
            both = [logs, *watchers]
            training = Training(settings, trainee, optimizer, prepared.train, prepared.val, save, both, position, stopping)
            began(Begun(training.steps, position, sum(p.value.size for p in parameters.values()), logs.has_tensorboard))
            training.run()
        finally:
            logs.close()
        return trained.publish(checkpoints.all()[-1], settings.output_dir, progress)


@dataclass(frozen=True)
class Begun:
    """A training that is about to take its first step."""

    steps: int
    position: Position
    parameters: int
    tensorboard: bool  # whether its logs are written


def make(prepared: Prepared) -> tuple[Any, Any]:
    """The trainee and its optimizer."""
    from . import AdamW, Trainee

    s = prepared.settings
    trainee = Trainee(prepared.weights, s.lora, ram=s.ram, seed=s.seed)
    return trainee, AdamW(trainee.parameters, s.learning_rate, s.weight_decay)
