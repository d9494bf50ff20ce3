"""Fine-tuning, from its settings to its result."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

from ..convert.job import source_record
from ..errors import MossError
from ..mpirun import started
from ..tokenizer import load_tokenizer
from ..weights import Weights, open_weights
from .checkpoints import Checkpoints
from .data import Conversations, read_conversations
from .full import check_memory
from .group import Group, join
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
    if started().processes > 1 and (settings.device == "cuda" or settings.vram is not None):
        raise MossError("several processes train on the CPU only: leave out mpirun, or --device cuda and --vram")
    if not settings.lora:
        check_memory(weights, started().here)  # before the first of them takes any
    tokenizer, limit = load_tokenizer(weights.folder), min(settings.max_seq_len, weights.config.n_ctx)
    paths = {name: settings.data_dir / f"{name}.jsonl" for name in ("train", "val")}
    train = read_conversations(paths["train"], tokenizer, limit, settings.skip_bad)
    val = read_conversations(paths["val"], tokenizer, limit, settings.skip_bad) if paths["val"].exists() else None
    record = {
        **settings.deciding,
        "model": source_record([region.path for region in weights.regions.values()]),
        "train.jsonl": train.digest,
        "processes": started().processes,
    }
    return Prepared(settings, weights, train, val, Checkpoints(settings.output_dir, record, settings.keep))


def run(
    prepared: Prepared,
    watchers: Iterable[Watcher] = (),
    saved: Callable[[Path], None] = lambda path: None,
    stopping: Callable[[], bool] = lambda: False,
    progress: Progress | None = None,
    began: Callable[[Begun], None] = lambda begun: None,
) -> Path | None:
    """Train, from the last checkpoint if there is one, and return the result's folder. Where mpirun started several processes,
    they train together; the first one writes, is watched, and has the result, None is the others'.

    ``began``: told of the training before its first step. ``saved``: told of each checkpoint. ``stopping``: asked between
    batches. ``progress``: of writing the result, in bytes. Raises loop.Stopped where it was asked to stop, in all processes,
    MossError for what the user can mend; whoever raised that must end at once, since the others wait for it.
    """
    group, checkpoints = join(), prepared.checkpoints
    with checkpoints.locked() if group.leads else nullcontext():
        trained, training, logs = _begin(prepared, group, watchers if group.leads else (), saved, stopping)
        try:
            count = trained.nbytes // 4  # in float32
            began(Begun(training.steps, training.position, count, bool(logs and logs.has_tensorboard)))
            training.run()
        finally:
            if logs:
                logs.close()
        if not group.leads:
            return None
        return trained.publish(checkpoints.all()[-1], prepared.settings.output_dir, progress)


def _begin(
    prepared: Prepared, group: Group, watchers: Iterable[Watcher], saved: Callable[[Path], None], stopping: Callable[[], bool]
) -> tuple[Adapter | Whole, Training, Logs | None]:
    """What is learned, its training, from the last checkpoint on, and the logs that it writes."""
    settings, checkpoints = prepared.settings, prepared.checkpoints
    if group.leads and settings.resume is False:
        checkpoints.clear()
    group.wait()
    last = checkpoints.latest()
    if settings.resume and last is None:
        raise MossError(f"{settings.output_dir}: holds no checkpoint to resume from")
    trainee, optimizer = make(prepared)
    base, parameters = prepared.weights, trainee.parameters
    trained = Adapter(base, settings.lora, parameters) if settings.lora else Whole(base.folder, parameters, settings.dtype)
    position = checkpoints.load(last, trained, optimizer) if last else Position()
    trainee.dropout_state = position.dropout_state
    if not group.agrees(_common(prepared, position)):
        raise MossError(
            f"{settings.output_dir}: the processes differ in their settings, model, data or checkpoint: all need the same "
            "command, and the same folders, on every machine"
        )
    logs = None
    if group.leads:
        checkpoints.check_room(trained, optimizer)
        logs = Logs(settings.logs, position)

    def save(position: Position) -> None:
        if group.leads:
            saved(checkpoints.save(position, trained, optimizer))
        group.wait()

    both = [logs, *watchers] if logs else []
    training = Training(settings, trainee, optimizer, prepared.train, prepared.val, save, both, position, stopping, group)
    return trained, training, logs


def _common(prepared: Prepared, position: Position) -> str:
    """What processes that train together have to have in common: what decides the numbers, and who waits for whom when."""
    s, val = prepared.settings, prepared.val and prepared.val.digest
    return json.dumps([prepared.checkpoints.record, s.eval_step, s.save_step, s.eval_bsz_per_gpu, val, position.step])


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
    tokens = min(max(s.train_bsz_per_gpu, s.eval_bsz_per_gpu) * s.max_seq_len, prepared.weights.config.n_ctx)
    trainee = Trainee(prepared.weights, s.lora, s.device, s.ram, s.vram, s.seed, tokens)
    return trainee, AdamW(trainee.parameters, s.learning_rate, s.weight_decay)
