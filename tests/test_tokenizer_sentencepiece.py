from __future__ import annotations

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from moss_jt.errors import MossError
from moss_jt.tokenizer import load_tokenizer

from .tokenizer_folders import SPECIALS, TEXT, sentencepiece_folder

KINDS = {
    "bpe": {"model_type": "bpe", "user_defined_symbols": [*SPECIALS, "  ", "\t\t"], "add_dummy_prefix": False},
    "unigram": {"model_type": "unigram", "control_symbols": SPECIALS, "add_dummy_prefix": False},
    "dummy prefix": {"model_type": "bpe", "control_symbols": SPECIALS},
}
# U+2581 is how SentencePiece writes a space.
ANY = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\u2581"), max_size=12)
TEXTS = st.lists(st.one_of(ANY, st.sampled_from([*SPECIALS, "  ", " ", "\n", "\t\t", "<eo", "你好，", TEXT])), max_size=8)


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    return sentencepiece_folder(tmp_path_factory.mktemp("sentencepiece"), **KINDS[request.param])


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def native(folder):
    return sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@settings(max_examples=200, deadline=None)
@given(ANY.filter(lambda text: not any(s in text for s in SPECIALS)))
def test_ids_are_those_of_sentencepiece(tokenizer, native, text):
    assert tokenizer.encode(text) == native.encode(text)


@settings(max_examples=300, deadline=None)
@given(TEXTS.map("".join))
def test_every_text_comes_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(-3, 450), max_size=40), st.booleans())
def test_decoding_one_by_one_gives_the_same(tokenizer, ids, skip_special):
    decoder = tokenizer.decoder(skip_special)
    assert "".join([decoder.push(i) for i in ids]) + decoder.finish() == tokenizer.decode(ids, skip_special)


def test_special_tokens(tokenizer, native):
    ids = [native.piece_to_id(s) for s in SPECIALS]
    assert [tokenizer.token_id(s) for s in SPECIALS] == ids
    assert tokenizer.special_ids == {*ids, native.bos_id(), native.eos_id()}
    assert [i for i in tokenizer.encode("the<eom><eoh>\n") if i in tokenizer.special_ids] == [ids[2], ids[1]]
    assert tokenizer.decode(tokenizer.encode("a <eom> b"), skip_special=True) == "a  b"
    assert tokenizer.token_id("<none>") is None
    assert tokenizer.vocab_size == native.get_piece_size()


def test_half_a_character_waits(tokenizer):
    ids = tokenizer.encode("the🎉")
    decoder = tokenizer.decoder()
    texts = [decoder.push(i) for i in ids]
    assert texts[-4:] == ["", "", "", "🎉"] and "".join(texts) == "the🎉"


def test_ids_outside_the_vocabulary_have_no_text(tokenizer):
    ids = tokenizer.encode("the")
    assert tokenizer.decode([-1, tokenizer.vocab_size, *ids, 2**40]) == "the"


def test_what_the_vocabulary_lacks(tmp_path):
    t = load_tokenizer(sentencepiece_folder(tmp_path, byte_fallback=False, add_dummy_prefix=False, vocab_size=60))
    assert t.decode(t.encode("the 龘 then")) == "the \ufffd then"


def test_lone_surrogates_are_refused(tokenizer):
    with pytest.raises(MossError, match=r"character 1 is the lone surrogate U\+D800"):
        tokenizer.encode("a\ud800")


@pytest.mark.parametrize("damage", [lambda data: b"", lambda data: data[:-100], lambda data: b"\0" * 100])
def test_a_broken_model_is_one_line(tmp_path, damage):
    path = sentencepiece_folder(tmp_path) / "tokenizer.model"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(MossError, match=r"tokenizer.model: damaged, or not a SentencePiece model"):
        load_tokenizer(tmp_path)
