"""What a fine-tuning is asked to do. Names are those of finetune_moss.py and its configuration, where they have them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from ..errors import MossError
from .lora import Lora


@dataclass(frozen=True)
class Settings:
    """``lora``: None trains all weights."""

    model_name_or_path: Path  # a converted checkpoint
    data_dir: Path  # holds train.jsonl and, to be evaluated on, val.jsonl
    output_dir: Path
    log_dir: Path | None = None  # None: output_dir/log
    n_epochs: int = 2
    train_bsz_per_gpu: int = 4  # conversations
    eval_bsz_per_gpu: int = 4
    gradient_accumulation_steps: int = 1  # batches for each step
    gradient_clipping: float = 1.0  # the longest gradient; 0: any
    learning_rate: float = 1.5e-5
    warmup_rates: float = 0.05  # share of the steps
    weight_decay: float = 0.1
    max_seq_len: int = 2048
    eval_step: int = 200
    save_step: int = 2000
    seed: int = 42
    lora: Lora | None = None
    keep: int = 1  # checkpoints
    skip_bad: bool = False
    resume: bool | None = None  # None: where there is a checkpoint; True: there must be one; False: start anew
    dtype: str = "fp16"  # of the resulting checkpoint
    device: str = "auto"  # what computes: auto, cpu or cuda; a GPU trains adapters only
    ram: str | int | None = None  # for an adapter: the most memory, in bytes or like "6GiB"
    vram: str | int | None = None  # the same of a GPU's memory

    def __post_init__(self) -> None:
        """Raises MossError for a number that makes no sense."""
        for name, least in _LEAST.items():
            if getattr(self, name) < least:
                raise MossError(f"{name} is {getattr(self, name)}, it must be {least} or more")
        if not self.learning_rate > 0:
            raise MossError(f"learning_rate is {self.learning_rate}, it must be above 0")
        if not 0 <= self.warmup_rates < 1:
            raise MossError(f"warmup_rates is {self.warmup_rates}, it must be from 0 to below 1: a share of all steps")
        if self.seed > _LARGEST_SEED:
            raise MossError(f"seed is {self.seed}, it can be at most {_LARGEST_SEED}")
        if self.ram is not None and not self.lora:
            raise MossError("ram is a budget for frozen weights: without an adapter, all weights have to be in memory")
        if self.device not in ("auto", "cpu", "cuda"):
            raise MossError(f"device is {self.device!r}, expected auto, cpu or cuda")
        if not self.lora and (self.device == "cuda" or self.vram is not None):
            raise MossError("all weights are trained on the CPU only: take --device cpu, or --lora_rank for an adapter")
        if self.vram is not None and self.device == "cpu":
            raise MossError("vram is a budget of a GPU's memory, and device is cpu")
        if self.lora and self.dtype != "fp16":
            raise MossError(
                "dtype is a whole model's; an adapter is written as it is, and merging it can quantise what comes of it"
            )

    @property
    def logs(self) -> Path:
        return self.log_dir or self.output_dir / "log"

    @property
    def deciding(self) -> dict:
        """The settings on which every number of the training depends: those that a resumed one must share."""
        found = {name: getattr(self, name) for name in _DECIDING}
        # Within a budget batches are divided, so sums are taken, and dropout is drawn, in another order.
        return {**found, "ram": "limited" if self.ram else "unlimited", "lora": asdict(self.lora) if self.lora else None}


_LARGEST_SEED = 2**32 - 1  # numpy's
_LEAST = {
    **dict.fromkeys(("n_epochs", "train_bsz_per_gpu", "eval_bsz_per_gpu", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("eval_step", "save_step", "keep"), 1),
    **dict.fromkeys(("gradient_clipping", "weight_decay", "seed"), 0),
    "max_seq_len": 2,
}
_DECIDING = (
    "n_epochs",
    "train_bsz_per_gpu",
    "gradient_accumulation_steps",
    "gradient_clipping",
    "learning_rate",
    "warmup_rates",
    "weight_decay",
    "max_seq_len",
    "seed",
)
