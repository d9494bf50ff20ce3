"""Runs of moss-jt train sft: what they are given, and what they leave behind."""

from __future__ import annotations

import json

from moss_jt.weights import open_weights

ARGS = ["-m", "base", "--data_dir", "data", "--output_dir", "out", "--learning_rate", "0.5", "--n_epochs", "3"]
SMALL = ["--train_bsz_per_gpu", "2", "--eval_bsz_per_gpu", "2", "--eval_step", "4", "--save_step", "5"]


def write(path, samples):
    path.write_text("".join(json.dumps(s, ensure_ascii=False) + "\n" for s in samples), "utf-8")


def metrics(folder="out/log"):
    with open(f"{folder}/metrics.jsonl", encoding="utf-8") as file:
        return [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in file]


def tensors(folder):
    weights = open_weights(folder)
    return {f"{file}/{name}": x.copy() for file, region in weights.regions.items() for name, x in region.map().items()}
