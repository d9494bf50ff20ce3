from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moss_jt.errors import MossError
from moss_jt.tokenizer import load_tokenizer, write_tokenizer

from .conftest import ROOT
from .tokenizer_folders import RUNS, SPECIALS, TEXT, official_folder, sentencepiece_folder
from .tokenizer_reference import OfficialTokenizer, byte_symbols

KEEPING = set(SPECIALS[1:])  # <|endoftext|> is declared as a plain string, and takes the whitespace beside it

RUN = st.one_of(
    st.builds(lambda char, n: char * n, st.sampled_from(" \t"), st.integers(1, 70)),
    st.text(" \t", min_size=1, max_size=12),
    st.text(" \t\n\r\x0b\x1c\x1f\x85\xa0\u200b\u3000", max_size=6),
)
AWKWARD = [*SPECIALS, "<eo", "<", "eoh>", "<|endoftext", "<|Human|>:", "'s", "'LL", "'ve", "ſ", "don't", "x1", "2023²½", "٣Ⅷ"]
AWKWARD += [
    "你好，",
    "世界",
    "e\u0301",
    "👩\u200d👧",
    "🇨🇳",
    "ก็",
    "العربية",
    "한국어",
    "\u1112\u1161",
    "\x00",
    "\ufeff",
    "\ufffd",
    TEXT,
]
# Characters that Unicode assigned lately are letters to some libraries and nothing yet to others.
ANY = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=10)
TEXTS = st.lists(st.one_of(RUN, st.sampled_from(AWKWARD), ANY), max_size=8).map("".join)


@pytest.fixture(scope="module")
def official(tmp_path_factory):
    return official_folder(tmp_path_factory.mktemp("official"))


@pytest.fixture(scope="module")
def converted(official, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    write_tokenizer(official, folder)
    return folder


@pytest.fixture(scope="module")
def converted_tokenizer(converted):
    return load_tokenizer(converted)


@pytest.fixture(scope="module")
def small(official):
    return load_tokenizer(official)


@pytest.fixture(scope="module")
def reference(official):
    return OfficialTokenizer(official, KEEPING, set(SPECIALS))


@pytest.fixture(scope="module")
def moss(shared):
    return load_tokenizer(shared / "moss_tokenizer")


@pytest.fixture(scope="module")
def moss_reference(shared):
    return OfficialTokenizer(shared / "moss_tokenizer", KEEPING, set(SPECIALS))


@pytest.fixture(scope="module")
def records(golden):
    return json.loads((golden / "tokenizer.json").read_text("utf-8"))


# -- encoding -------------------------------------------------------------------------------------------------------------


@settings(max_examples=400, deadline=None)
@given(TEXTS)
def test_ids_are_the_official_ones(small, reference, text):
    assert small.encode(text) == reference.encode(text)


@settings(max_examples=100, deadline=None)
@given(TEXTS)
def test_ids_stay_the_same_after_conversion(small, converted_tokenizer, text):
    assert converted_tokenizer.encode(text) == small.encode(text)


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_ids_of_the_real_vocabulary(moss, moss_reference, text):
    assert moss.encode(text) == moss_reference.encode(text)


def test_golden(moss, records):
    assert [moss.encode(r["text"]) for r in records] == [r["ids"] for r in records]


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("def f():\n    return", ["def f():", "    ", "return"]),  # the run takes the newline
        ("a <eoh>\n", ["a ", "<eoh>", "\n"]),  # a special token takes nothing
        ("a <|endoftext|>\n", ["a", "<|endoftext|>"]),  # but this one is declared so that it does
        ("a <eoh>  \n", ["a ", "<eoh>", "  "]),
        ("x      y", ["x", "     ", "y"]),  # six: a run of five, and the sixth is taken
        ("x       \ny", ["x", "     ", "\ny"]),  # a run that touches a run vanishes, and takes nothing itself
        ("  \t\t  x", ["  ", "  ", "x"]),  # so the third lives
        ("  \n  ", ["  ", "  "]),  # these do not touch
        ("  \t\t x", ["  ", " x"]),
        ("x\x1c  \x85\u3000y", ["x", "  ", "y"]),  # whitespace is what Python's str.strip takes
        ("x\u200b  y", ["x\u200b", "  ", "y"]),
    ],
)
def test_runs_take_the_whitespace_beside_them(small, reference, text, kept):
    whole = {token: [i] for token, i in reference.whole.items()}
    assert small.encode(text) == [i for piece in kept for i in whole.get(piece) or reference.encode(piece)]


@pytest.mark.parametrize("text", ["a\ud800b", "\ud83d\ude00", "  \udcff"])
def test_lone_surrogates_are_refused(small, text):
    with pytest.raises(MossError, match=r"lone surrogate U\+D[0-9A-F]{3}"):
        small.encode(text)


@pytest.mark.parametrize("part", ["x = 1\n    ", " ", "\n", "  \n", "\t \t\t", "a", "<", "你", " \x1c"])
def test_long_texts_take_linear_time(small, part):
    start = time.monotonic()
    small.encode(part * (300_000 // len(part)))
    assert time.monotonic() - start < 10  # a quadratic step takes minutes


# -- decoding -------------------------------------------------------------------------------------------------------------


@settings(max_examples=200, deadline=None)
@given(TEXTS)
def test_what_encoding_keeps_comes_back(small, reference, text):
    assume("".join(reference.stripped(reference.cut(text))) == text)
    assert small.decode(small.encode(text)) == text


def test_golden_comes_back(moss, moss_reference, records):
    for r in records:
        assert moss.decode(r["ids"]) == "".join(moss_reference.stripped(moss_reference.cut(r["text"])))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(-3, 400), max_size=40), st.booleans())
def test_decoding_one_by_one_gives_the_same(small, ids, skip_special):
    decoder = small.decoder(skip_special)
    assert "".join([decoder.push(i) for i in ids]) + decoder.finish() == small.decode(ids, skip_special)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 255), max_size=40))
def test_decoding_any_bytes(small, raw):
    ids = [small.token_id(byte_symbols()[b]) for b in raw]
    assert small.decode(ids) == bytes(raw).decode(errors="replace")


def test_half_a_character_waits(small):
    ids = small.encode("你好🎉")
    assert len(ids) == 5
    decoder = small.decoder()
    assert [decoder.push(i) for i in ids] == ["你好", "", "", "", "🎉"]
    assert decoder.finish() == ""
    assert [decoder.push(i) for i in ids[1:4]] == ["", "", ""] and decoder.finish() == "\ufffd"
    assert decoder.push(ids[1]) == "" and decoder.push(small.token_id("a")) == "\ufffda"


def test_special_tokens_can_be_left_out(small):
    ids = small.encode("a<eoh>\n  b <eom>")
    assert small.decode(ids) == "a<eoh>  b <eom>"
    assert small.decode(ids, skip_special=True) == "a  b "
    assert small.decoder().push(small.token_id("<eom>")) == ""
    assert small.decoder(skip_special=False).push(small.token_id("<eom>")) == "<eom>"


def test_ids_outside_the_vocabulary_have_no_text(small):
    a = small.token_id("a")
    outside = [-1, -(2**70), small.vocab_size, 107007, 2**32, 2**70]
    assert small.decode([a, *outside, a]) == "aa"


# -- what it says of itself -----------------------------------------------------------------------------------------------


def test_tokens_by_name(small, reference):
    assert small.vocab_size == len(reference.vocab) + len(RUNS) + len(SPECIALS) - 1
    assert {s: small.token_id(s) for s in SPECIALS} == {s: reference.whole[s] for s in SPECIALS}
    assert small.token_id("<none>") is None
    assert small.special_ids == {reference.whole[s] for s in SPECIALS}


def test_tokens_of_the_real_vocabulary(moss):
    assert moss.vocab_size == 106072
    assert moss.special_ids == {106028, *range(106067, 106072)}
    assert moss.token_id("<eom>") == 106068


def test_special_tokens_need_no_declaration(official, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_bytes((official / name).read_bytes())
    t = load_tokenizer(tmp_path)
    assert t.special_ids == load_tokenizer(official).special_ids
    assert t.decode(t.encode("a <eoh> b <|endoftext|> c")) == "a <eoh> b <|endoftext|> c"


def test_a_declaration_is_followed(official, tmp_path):
    for name in ("vocab.json", "merges.txt", "added_tokens.json"):
        (tmp_path / name).write_bytes((official / name).read_bytes())
    declared = [{"content": "<eoh>", "lstrip": True, "rstrip": False}, "<eot>", "<new>"]
    names = {"bos_token": "<|endoftext|>", "eos_token": {"content": "<|endoftext|>"}, "additional_special_tokens": declared}
    (tmp_path / "special_tokens_map.json").write_text(json.dumps(names))
    t = load_tokenizer(tmp_path)
    assert t.decode(t.encode("a <eoh> b <eot> c <|endoftext|> d <new> e")) == "a<eoh> b<eot>c <|endoftext|> d<new>e"
    assert t.token_id("<new>") == t.vocab_size - 1 and t.token_id("<new>") in t.special_ids


# -- files ----------------------------------------------------------------------------------------------------------------


def test_written_files(official, converted):
    names = {"vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "tokenizer_config.json"}
    assert {p.name for p in converted.iterdir()} == {*names, "tokenizer.json"}
    for name in names:
        assert (converted / name).read_bytes() == (official / name).read_bytes()


def test_written_bytes_are_always_the_same(official, converted, tmp_path):
    code = "import sys; from moss_jt.tokenizer import write_tokenizer; write_tokenizer(*sys.argv[1:])"
    env = {**os.environ, "PYTHONHASHSEED": "7", "LC_ALL": "C"}
    subprocess.run([sys.executable, "-c", code, official, tmp_path], check=True, env=env, cwd=ROOT)
    assert (tmp_path / "tokenizer.json").read_bytes() == (converted / "tokenizer.json").read_bytes()


def test_the_written_file_opens_by_itself(converted, reference):
    from tokenizers import Tokenizer

    alone = Tokenizer.from_file(str(converted / "tokenizer.json"))
    for text in [TEXT, "def f():\n    return 1\n\n\n  x\t\ty", "a <eoh> b <|endoftext|> c", "你好  世界"]:
        assert alone.encode(text).ids == reference.encode(text)


def test_the_real_written_file_opens_by_itself(shared, records, tmp_path):
    from tokenizers import Tokenizer

    write_tokenizer(shared / "moss_tokenizer", tmp_path)
    alone = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert [alone.encode(r["text"]).ids for r in records] == [r["ids"] for r in records]


def test_a_tokenizer_json_is_copied(converted, tmp_path):
    data = json.loads((converted / "tokenizer.json").read_text("utf-8"))
    data["truncation"] = {"max_length": 3, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir(), dst.mkdir()
    (src / "tokenizer.json").write_text(json.dumps(data, indent=1))
    write_tokenizer(src, dst)
    assert [p.name for p in dst.iterdir()] == ["tokenizer.json"]
    assert (dst / "tokenizer.json").read_bytes() == (src / "tokenizer.json").read_bytes()
    assert load_tokenizer(dst).encode(TEXT) == load_tokenizer(converted).encode(TEXT)  # nothing is cut off


def test_a_sentencepiece_model_is_copied(tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir(), dst.mkdir()
    sentencepiece_folder(src)
    write_tokenizer(src, dst)
    assert [p.name for p in dst.iterdir()] == ["tokenizer.model"]
    assert (dst / "tokenizer.model").read_bytes() == (src / "tokenizer.model").read_bytes()


def _edit(name, change):
    def damage(folder):
        path = folder / name
        value = json.loads(path.read_text("utf-8"))
        change(value)
        path.write_text(json.dumps(value), "utf-8")

    return damage


def _write(name, data):
    return lambda folder: (folder / name).write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "merges.txt").unlink(), "merges.txt: no such file"),
        (lambda f: (f / "vocab.json").unlink(), "vocab.json: no such file"),
        (lambda f: [p.unlink() for p in f.iterdir()], "no tokenizer there: it needs tokenizer.json, or"),
        (lambda f: ((f / "vocab.json").unlink(), (f / "vocab.json").mkdir()), "vocab.json: cannot be read: Is a directory"),
        (_write("vocab.json", b'{"a": 0'), "vocab.json: damaged, not a JSON object"),
        (_write("vocab.json", b"\xff\xfe"), "vocab.json: damaged, not a JSON object"),
        (_write("vocab.json", b'["a"]'), "vocab.json: damaged, not a JSON object"),
        (_write("vocab.json", b"[" * 100_000), "vocab.json: damaged, not a JSON object"),
        (_write("vocab.json", b"version https://git-lfs.github.com/spec/v1\noid"), "vocab.json: this is a Git LFS pointer"),
        (_edit("vocab.json", lambda v: v.update(a="0")), "vocab.json: damaged, an id is not a number"),
        (_write("merges.txt", b"#version: 0.2\na b\n"), "src: the tokenizer is damaged ("),
        (_edit("added_tokens.json", lambda v: v.update({"\ud800": v.pop("<eor>")})), "a token is not Unicode"),
        (_write("merges.txt", b"#version: 0.2\na b\nabc\n"), "merges.txt: damaged, line 3 is not two symbols"),
        (_write("merges.txt", b"#\n\xff\xff\n"), "merges.txt: damaged, not UTF-8"),
        (_edit("added_tokens.json", lambda v: v.update({"<x>": 9999})), "added_tokens.json: it does not continue vocab.json"),
        (
            _edit("added_tokens.json", lambda v: v.update(a=v.pop("<eor>"))),
            "added_tokens.json: it does not continue vocab.json",
        ),
        (_edit("special_tokens_map.json", lambda v: v.update(eos_token=5)), "special_tokens_map.json: eos_token is neither"),
        (_write("tokenizer.json", b"{}"), "tokenizer.json: the tokenizer is damaged"),
        (_write("tokenizer.json", b"\xff"), "tokenizer.json: the tokenizer is damaged"),
        (
            _write("tokenizer.json", b'{"version":"1.0","model":{"type":"WordLevel","vocab":{"a":0},"unk_token":"a"}}'),
            "not a byte",
        ),
    ],
)
def test_broken_files_are_one_line(official, tmp_path, damage, says):
    src, dst = tmp_path / "src", tmp_path / "dst"
    src.mkdir(), dst.mkdir()
    for path in official.iterdir():
        (src / path.name).write_bytes(path.read_bytes())
    damage(src)
    for broken in (lambda: load_tokenizer(src), lambda: write_tokenizer(src, dst)):
        with pytest.raises(MossError) as e:
            broken()
        assert says in str(e.value) and str(src) in str(e.value) and "\n" not in str(e.value)
    assert not list(dst.iterdir())


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(MossError, match="no such folder"):
        load_tokenizer(tmp_path / "none")


def test_a_folder_that_cannot_be_written(official, tmp_path):
    with pytest.raises(MossError, match=r"tokenizer.json: cannot be written: No such file or directory"):
        write_tokenizer(official, tmp_path / "none")


def test_importing_it_is_cheap():
    heavy = "{'tokenizers', 'sentencepiece', 'numpy', 'jittor', 'torch', 'transformers'}"
    code = f"import sys, moss_jt.tokenizer, moss_jt.cli.tokenize; sys.exit(repr({heavy} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT).stderr.strip() == "set()"
