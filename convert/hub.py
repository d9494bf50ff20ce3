"""Where a source is: a folder, or a model of the Hugging Face Hub, fetched into the Hub's own cache."""

from __future__ import annotations

import re
from pathlib import Path

from ..errors import MossError
from ..meta_instruction import FILE as META_INSTRUCTION_FILE

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_SMALL = ["*.json", "merges.txt", "*.model", META_INSTRUCTION_FILE]
# safetensors first: where a model has both, one of them is enough.
_WEIGHTS = (["*.safetensors"], ["pytorch_model*.bin", "gptq_model*.bin"])


def locate(src: str | Path, revision: str | None, download: bool) -> Path:
    """The source's folder. A Hub id's missing files are fetched if ``download``; what was fetched before is not fetched again.

    Raises MossError where there is no such folder, or the Hub cannot be reached or has no such model.
    """
    if Path(src).exists() or not _HUB_ID.fullmatch(str(src)):
        if revision is not None:
            raise MossError(f"{src}: not a Hub id like fnlp/moss-moon-003-sft, so it has no revision {revision}")
        return Path(src)  # opening it says what is wrong with it
    return _fetch(str(src), revision, download)


def _fetch(name: str, revision: str | None, download: bool) -> Path:
    from huggingface_hub import snapshot_download

    folder = None
    for patterns in _WEIGHTS:
        try:
            folder = Path(
                snapshot_download(name, revision=revision, allow_patterns=_SMALL + patterns, local_files_only=not download)
            )
        except Exception as e:  # whatever the network's libraries raise: OSError, ValueError and classes of their own
            raise MossError(f"{name}: {_reason(e, download)}") from None
        if any(folder.glob(patterns[0])):
            break
    return folder


def _reason(e: Exception, download: bool) -> str:
    if not download:
        return "no such folder, and not downloaded yet; only a real run downloads"
    kind = type(e).__name__
    if kind == "RevisionNotFoundError":
        return "the Hub's model has no such revision"
    if kind in ("RepositoryNotFoundError", "GatedRepoError"):
        return "no such folder, and no such model on the Hub that is open to you"
    first = (str(e).splitlines() or [kind])[0]
    return f"no such folder, and it cannot be fetched from the Hub: {first[:200]}"
