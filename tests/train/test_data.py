from __future__ import annotations

import json

import numpy as np
import pytest

from moss_jt.errors import MossError
from moss_jt.train.batch import NO_LOSS
from moss_jt.train.data import Order, in_file_order, read_conversations
from moss_jt.train.schedule import cosine

from ..fake_moss import FakeTokenizer
from ..test_dialogues import PLAIN, TURN, conversation, without


@pytest.fixture
def write(tmp_path):
    def to_file(*lines):
        path = tmp_path / "train.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return to_file


def read(path, limit=2048, **options):
    return read_conversations(path, FakeTokenizer(), limit, **options)


# ---- labels -----------------------------------------------------------------------------------------------------------------


def official_example(sample: dict, encode, limit: int = 2048) -> tuple[list[int], list[int]] | None:
    """Ids and labels as finetune_moss.py makes them, followed statement by statement."""
    meta = encode(sample["meta_instruction"])
    ids, spans = list(meta), [(0, len(meta))]
    for i in range(int(sample["num_turns"])):
        turn, turn_spans = [], []
        for key, value in sample["chat"][f"turn_{i + 1}"].items():
            new = encode(value)
            if key == "Tool Responses":
                turn_spans.append((len(ids + turn) + 5, len(ids + turn + new) - 2))
            turn += new
        if len(ids + turn) > limit:
            break
        ids, spans = ids + turn, spans + turn_spans
    if len(ids) == len(meta):
        return None
    labels = list(ids)
    for start, end in spans:
        labels[start:end] = [-100] * len(labels[start:end])
    return ids, labels


NO_TOOL = {**TURN, "Commands": "<|Commands|>: None<eoc>\n", "Tool Responses": "<|Results|>:\nNone\n<eor>\n"}
SEARCH = {
    **TURN,
    "Commands": '<|Commands|>: Search("a"), Search("b")<eoc>\n',
    "Tool Responses": "<|Results|>:\nSearch(\"a\") =>\n<|1|>: '你好'\n<|2|>: 'x'\n<eor>\n",
}
IN_ANOTHER_ORDER = dict(reversed(TURN.items()))
SHORT_RESULT = {**TURN, "Tool Responses": "<eor>\n"}


@pytest.mark.parametrize("turn", [PLAIN, TURN, NO_TOOL, SEARCH, IN_ANOTHER_ORDER, SHORT_RESULT])
def test_labels_of_every_kind_of_turn(write, turn):
    sample = conversation(PLAIN, turn, TURN)
    batch = read(write(sample)).batch(np.array([0]))
    ids, labels = official_example(sample, FakeTokenizer().encode)
    assert batch.ids.tolist() == [ids] and batch.labels.tolist() == [labels]
    assert batch.ids.dtype == batch.labels.dtype == np.int32


def test_labels_written_out(write):
    """The same by hand: no loss on the meta instruction, and in Tool Responses none from its 6th token up to its 3rd from the
    end. (A token of this tokenizer is a byte, or a special token.)"""
    batch = read(write(conversation(TURN, meta="meta"))).batch(np.array([0]))
    tool = TURN["Tool Responses"]
    inside = tool[5:].removesuffix("<eor>\n")
    with_loss = [
        "".join(TURN[role] for role in ("Human", "Inner Thoughts", "Commands")) + tool[:5],
        "<eor>\n" + TURN["MOSS"],
    ]
    encode = FakeTokenizer().encode
    expected = [-100] * 4 + encode(with_loss[0]) + [-100] * len(encode(inside)) + encode(with_loss[1])
    assert batch.labels[0].tolist() == expected


def test_golden_dialogues_as_officially(golden, shared, tmp_path):
    from moss_jt.tokenizer import load_tokenizer

    from ..dialogue_files import golden_dialogues
    from ..dialogue_files import write as write_file

    tokenizer = load_tokenizer(shared / "moss_tokenizer")
    samples = golden_dialogues(golden, tokenizer)
    found = read_conversations(write_file(tmp_path / "train.jsonl", samples), tokenizer, 2048)
    assert len(found) == len(samples) > 5
    for i, sample in enumerate(samples):
        ids, labels = official_example(sample, tokenizer.encode)
        batch = found.batch(np.array([i]))
        assert batch.ids[0].tolist() == ids and batch.labels[0].tolist() == labels


def test_batches_are_padded_on_the_right_and_padding_has_no_loss(write):
    found = read(write(conversation(TURN, PLAIN), conversation(PLAIN), conversation(TURN)))
    batch = found.batch(np.array([1, 0]))
    assert batch.ids.shape == batch.labels.shape == (2, found.lengths[0])
    for row, i in enumerate([1, 0]):
        alone, length = found.batch(np.array([i])), found.lengths[i]
        assert batch.ids[row, :length].tolist() == alone.ids[0].tolist()
        assert batch.labels[row, :length].tolist() == alone.labels[0].tolist()
        assert (batch.labels[row, length:] == NO_LOSS).all()


# ---- what does not fit, and what is bad -------------------------------------------------------------------------------------

LONG = {**PLAIN, "MOSS": "<|MOSS|>: " + "x" * 3000 + "<eom>\n"}
BAD = [
    ("{", "not JSON"),
    (conversation(PLAIN, num_turns=2), '"turn_2" is missing'),
    (conversation({**PLAIN, "Moss": "x"}), 'the key "Moss"'),
    (conversation(without(PLAIN, "MOSS")), 'no "MOSS"'),
    (conversation(LONG, PLAIN), "too long: its first turn ends beyond 2048 tokens"),
]


def test_turns_that_do_not_fit_are_left_out_as_officially(write):
    sample = conversation(PLAIN, TURN, LONG, PLAIN)
    found = read(write(conversation(PLAIN), sample))
    ids, _ = official_example(sample, FakeTokenizer().encode)
    assert found.batch(np.array([1])).ids.tolist() == [ids]
    assert found.left_out == {2: 2} and not found.bad


@pytest.mark.parametrize(("line", "said"), BAD)
def test_bad_data_names_file_and_line(write, line, said):
    path = write(conversation(PLAIN), "", line)
    with pytest.raises(MossError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: ") and said in str(error.value)
    assert "--skip_bad" in str(error.value)


def test_skipping_bad_lines_counts_them(write):
    lines = [line for line, _ in BAD]
    found = read(write(*lines, conversation(PLAIN), *lines, conversation(TURN)), skip_bad=True)
    assert len(found) == 2
    assert sorted(found.bad) == [1, 2, 3, 4, 5, 7, 8, 9, 10, 11]
    assert all(said in found.bad[i] for i, (_, said) in enumerate(BAD, 1))


def test_only_bad_lines_are_an_error_anyway(write):
    with pytest.raises(MossError, match=r"holds no conversation; 5 bad lines were left out"):
        read(write(*(line for line, _ in BAD)), skip_bad=True)
    with pytest.raises(MossError, match=r"train\.jsonl: holds no conversation$"):
        read(write())


def test_digest_tells_other_tokens_and_other_masks(write):
    digests = {
        read(write(*lines)).digest
        for lines in (
            [conversation(PLAIN)],
            [conversation(TURN)],
            [conversation(PLAIN), conversation(PLAIN)],
            [conversation(PLAIN, meta="You are MOSS.\n" + PLAIN["Human"])],
            [conversation({"Human": PLAIN["Human"], "Tool Responses": PLAIN["Human"], "MOSS": PLAIN["MOSS"]})],
            [conversation({"Human": PLAIN["Human"] * 2, "MOSS": PLAIN["MOSS"]})],
        )
    }
    assert len(digests) == 6
    assert read(write(conversation(PLAIN))).digest == read(write("", conversation(PLAIN))).digest


# ---- order ------------------------------------------------------------------------------------------------------------------

LENGTHS = np.random.RandomState(0).randint(10, 2000, 1003)


@pytest.mark.parametrize(("batch", "accumulated"), [(1, 1), (4, 1), (4, 3), (2000, 1), (7, 2)])
def test_every_epoch_takes_each_conversation_once(batch, accumulated):
    order = Order(LENGTHS, batch, accumulated, seed=1)
    epochs = []
    for epoch in range(2):
        steps = [order.step(epoch * order.steps_per_epoch + i) for i in range(order.steps_per_epoch)]
        assert all(len(step) == accumulated for step in steps[:-1]) and 0 < len(steps[-1]) <= accumulated
        batches = [b for step in steps for b in step]
        assert all(len(b) <= batch for b in batches) and sum(len(b) < batch for b in batches) <= 1
        epochs.append(np.concatenate(batches))
        assert sorted(epochs[-1]) == list(range(len(LENGTHS)))
    if batch < len(LENGTHS):
        assert epochs[0].tolist() != epochs[1].tolist()


def test_the_order_is_a_function_of_the_seed_wherever_one_begins():
    first = Order(LENGTHS, 4, 2, seed=1)
    steps = [first.step(i) for i in range(300)]
    for i in (299, 0, 126, 125, 250):
        again = Order(LENGTHS, 4, 2, seed=1).step(i)
        assert [b.tolist() for b in again] == [b.tolist() for b in steps[i]]
    other = Order(LENGTHS, 4, 2, seed=2)
    assert [b.tolist() for b in other.step(0)] != [b.tolist() for b in steps[0]]


def test_conversations_of_a_batch_are_about_equally_long():
    def padding(batches):
        return 1 - sum(LENGTHS[b].sum() for b in batches) / sum(LENGTHS[b].max() * len(b) for b in batches)

    order = Order(LENGTHS, 8, 1, seed=1)
    batches = [order.step(i)[0] for i in range(order.steps_per_epoch)]
    assert padding(batches) < 0.03 < 0.3 < padding(np.array_split(np.arange(len(LENGTHS)), len(batches)))
    lengths = [LENGTHS[b].max() for b in batches]
    assert np.abs(np.corrcoef(np.arange(len(lengths)), lengths)[0, 1]) < 0.3  # they do not come by length


def test_evaluation_is_in_file_order():
    assert [b.tolist() for b in in_file_order(5, 2)] == [[0, 1], [2, 3], [4]]


# ---- learning rate ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("steps", "warmup"), [(100, 0.05), (10, 0), (7, 0.5), (1, 0.05), (1000, 0.1)])
def test_learning_rate_is_transformers_cosine_with_warmup(steps, warmup):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, int(warmup * steps), steps)
    for step in range(steps):
        assert cosine(step, steps, warmup) == pytest.approx(schedule.get_last_lr()[0], rel=1e-12, abs=1e-15)
        optimizer.step()
        schedule.step()


def test_learning_rate_rises_in_a_line_and_falls_along_a_cosine():
    rates = [cosine(i, 100, 0.1) for i in range(100)]
    assert rates[:11] == pytest.approx([i / 10 for i in range(11)])
    assert rates[55] == pytest.approx(0.5) and rates[40] == pytest.approx(0.75)
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
