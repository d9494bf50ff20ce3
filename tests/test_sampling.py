from __future__ import annotations

import numpy as np
import pytest

from moss_jt import MossError
from moss_jt.sampling import Likeliest, Sampler, Sampling, distribution, likeliest, penalised


def softmax(x):
    p = np.exp(x - x.max())
    return p / p.sum()


def test_top_k_keeps_the_highest_and_temperature_sharpens():
    logits = np.array([1.0, 4.0, 2.0, 3.0, -5.0], np.float32)
    ids, p = distribution(likeliest(logits, 3), temperature=0.5, top_p=1)
    assert ids.tolist() == [1, 3, 2]
    np.testing.assert_allclose(p, softmax(np.array([8.0, 6.0, 4.0])), rtol=1e-6)


def test_top_p_keeps_the_fewest_likeliest_that_pass_it():
    logits = np.log(np.array([0.15, 0.5, 0.05, 0.3], np.float32))
    kept = {top_p: distribution(likeliest(logits, 0), 1, top_p)[0].tolist() for top_p in (0.1, 0.49, 0.51, 0.81, 0.96, 1)}
    assert kept == {0.1: [1], 0.49: [1], 0.51: [1, 3], 0.81: [1, 3, 0], 0.96: [1, 3, 0, 2], 1: [1, 3, 0, 2]}


def test_top_p_counts_within_what_top_k_left():
    logits = np.log(np.array([0.4, 0.3, 0.2, 0.1], np.float32))
    ids, p = distribution(likeliest(logits, 2), 1, top_p=0.6)  # of 4/7 and 3/7
    assert ids.tolist() == [0, 1]
    np.testing.assert_allclose(p, [4 / 7, 3 / 7], rtol=1e-6)


def test_penalty_moves_both_signs_down_once_however_often_seen():
    logits = np.array([2.0, -2.0, 1.0], np.float32)
    assert penalised(logits, np.array([0, 1, 0, 1]), 2.0).tolist() == [1.0, -4.0, 1.0]
    assert logits.tolist() == [2.0, -2.0, 1.0]


@pytest.mark.parametrize("case", range(20))
def test_as_transformers(case):
    torch, hf = pytest.importorskip("torch"), pytest.importorskip("transformers.generation.logits_process")
    rng = np.random.default_rng(case)
    logits, seen = (rng.standard_normal(500) * 4).astype(np.float32), rng.integers(0, 500, 30)
    temperature, top_k, top_p, penalty = (
        rng.uniform(0.2, 2),
        int(rng.integers(1, 100)),
        rng.uniform(0.05, 1),
        rng.uniform(0.8, 1.5),
    )
    scores = torch.tensor(logits)[None]
    for processor in (
        hf.RepetitionPenaltyLogitsProcessor(penalty),
        hf.TemperatureLogitsWarper(temperature),
        hf.TopKLogitsWarper(top_k),
        hf.TopPLogitsWarper(top_p),
    ):
        scores = processor(torch.tensor(seen)[None], scores)
    expected = torch.softmax(scores[0].double(), 0).numpy()
    ids, p = distribution(likeliest(penalised(logits, seen, penalty), top_k), temperature, top_p)
    ours = np.zeros(500)
    ours[ids] = p
    np.testing.assert_allclose(ours, expected, atol=1e-6)


def test_choices_follow_the_distribution_and_the_seed():
    logits, seen = np.log(np.array([0.1, 0.6, 0.3], np.float32)), np.array([0])
    sampling = Sampling(temperature=1, top_k=0, top_p=1, repetition_penalty=1, seed=7)
    sampler = Sampler(sampling)
    chosen = [sampler.choose(logits, seen) for _ in range(4000)]
    np.testing.assert_allclose(np.bincount(chosen) / 4000, [0.1, 0.6, 0.3], atol=0.03)  # 4 standard deviations
    again = Sampler(sampling)
    assert [again.choose(logits, seen) for _ in range(50)] == chosen[:50]


def test_greedy_takes_the_likeliest_and_no_penalty_unless_asked():
    logits, seen = np.array([1.0, 1.005, 0.0], np.float32), np.array([1])
    assert Sampler(Sampling(greedy=True)).choose(logits, seen) == 1
    assert Sampler(Sampling(greedy=True, repetition_penalty=1.02)).choose(logits, seen) == 0
    assert Sampling().penalty == 1.02


@pytest.mark.parametrize("greedy", [True, False])
def test_the_likeliest_are_as_good_as_all(greedy):
    logits, seen = np.random.default_rng().standard_normal(300).astype(np.float32), np.arange(0, 300, 7)
    sampling = Sampling(greedy=greedy, seed=3, repetition_penalty=1.3)
    few = likeliest(penalised(logits, seen, 1.3), sampling.enough)
    assert len(few.ids) == (1 if greedy else 40)
    whole, part = Sampler(sampling), Sampler(sampling)
    assert [part.choose(few, seen) for _ in range(50)] == [whole.choose(logits, seen) for _ in range(50)]


def test_of_equal_logits_the_lower_ids_come_first():
    assert likeliest(np.array([1, 3, 2, 3, 3], np.float32), 0).ids.tolist() == [1, 3, 4, 2, 0]
    assert isinstance(likeliest(np.zeros(5, np.float32), 1), Likeliest) and likeliest(np.zeros(5, np.float32), 1).ids == [0]


@pytest.mark.parametrize(
    "wrong", [{"temperature": 0}, {"top_p": 0}, {"top_p": 1.1}, {"top_k": -1}, {"repetition_penalty": 0}, {"seed": -1}]
)
def test_values_that_make_no_sense_are_named(wrong):
    with pytest.raises(MossError, match=next(iter(wrong))):
        Sampling(**wrong)
