"""Hub ids, with a downloader that stands in for the Hub's."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import huggingface_hub
import pytest

from moss_jt import MossError, convert
from moss_jt.weights import open_weights
from tests.checkpoints import random_state, small_config, write_official

CONFIG = small_config()


class Hub:
    """Has one model, in a folder; fetches a file only when it is asked for, and only once."""

    def __init__(self, model: Path, cache: Path):
        self.model, self.cache = model, cache
        self.calls: list[dict] = []
        self.fetched: list[str] = []
        self.error: Exception | None = None

    def snapshot_download(self, repo_id, *, revision=None, allow_patterns, local_files_only=False):
        self.calls.append({"repo_id": repo_id, "revision": revision, "local": local_files_only})
        if self.error:
            raise self.error
        self.cache.mkdir(exist_ok=True)
        for path in sorted(self.model.iterdir()):
            target = self.cache / path.name
            if any(fnmatch.fnmatch(path.name, p) for p in allow_patterns) and not target.exists():
                target.symlink_to(path)
                self.fetched.append(path.name)
        return str(self.cache)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    model = write_official(tmp_path / "model", CONFIG, random_state(CONFIG), shards=2)
    for name in ("modeling_moss.py", "README.md", "flax_model.msgpack"):
        (model / name).write_text("not needed")
    hub = Hub(model, tmp_path / "cache")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    return hub


def test_only_what_is_needed_is_fetched(tmp_path, hub):
    convert.weights("fnlp/moss-moon-003-sft", tmp_path / "dst", revision="v1")
    open_weights(tmp_path / "dst")
    assert {c["repo_id"] for c in hub.calls} == {"fnlp/moss-moon-003-sft"}
    assert {c["revision"] for c in hub.calls} == {"v1"}
    unneeded = {"modeling_moss.py", "README.md", "flax_model.msgpack"}
    assert set(hub.fetched) == {p.name for p in hub.model.iterdir()} - unneeded


def test_pickles_are_not_fetched_where_there_are_safetensors(tmp_path, hub):
    write_official(hub.model, CONFIG, random_state(CONFIG), "safetensors")
    convert.weights("fnlp/moss", tmp_path / "dst")
    assert "model.safetensors" in hub.fetched and not [n for n in hub.fetched if n.endswith(".bin")]


def test_a_second_run_fetches_nothing_anew(tmp_path, hub):
    convert.weights("fnlp/moss", tmp_path / "dst")
    hub.fetched.clear()
    convert.weights("fnlp/moss", tmp_path / "dst")
    assert hub.fetched == []


def test_a_folder_of_that_name_comes_first(tmp_path, hub, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_official(tmp_path / "fnlp" / "moss", CONFIG, random_state(CONFIG))
    convert.weights("fnlp/moss", "dst")
    assert hub.calls == []
    with pytest.raises(MossError, match="not a Hub id"):
        convert.weights("fnlp/moss", "dst2", revision="v1")


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (
            OSError("[Errno -3] Temporary failure in name resolution\nmore"),
            "it cannot be fetched from the Hub: .*name resolution$",
        ),
        (RuntimeError(""), "it cannot be fetched from the Hub: RuntimeError$"),
        (type("RepositoryNotFoundError", (Exception,), {})("404"), "no such model on the Hub that is open to you$"),
        (type("RevisionNotFoundError", (Exception,), {})("404"), "no such revision$"),
    ],
)
def test_errors_are_one_line(tmp_path, hub, error, says):
    hub.error = error
    with pytest.raises(MossError, match=rf"^fnlp/moss: .*{says}") as e:
        convert.weights("fnlp/moss", tmp_path / "dst")
    assert "\n" not in str(e.value)


def test_a_dry_run_fetches_nothing(tmp_path, hub):
    hub.error = OSError("not in the cache")
    with pytest.raises(MossError, match="not downloaded yet"):
        convert.plan_weights("fnlp/moss", tmp_path / "dst", download=False)
    assert [c["local"] for c in hub.calls] == [True]


@pytest.mark.parametrize("name", ["no-such-folder", "./a/b", "a/b/c", "/a/b", "~/x", "a b/c", ""])
def test_what_is_no_hub_id_is_not_asked_for(tmp_path, hub, name):
    with pytest.raises(MossError):
        convert.weights(name, tmp_path / "dst")
    assert hub.calls == []
