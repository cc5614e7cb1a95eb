import math

import pytest

from utils import compute_metrics


def test_by_hand():
    # Characters a b c d against a c b d e: 1-grams share 4 (P 4/4, R 4/5); 2-grams ab bc cd, ac cb bd de none; the
    # longest common subsequence is a b d or a c d, 3 long (P 3/4, R 3/5).
    metrics = compute_metrics(["abcd"], ["acbde"])
    assert metrics["rouge1"] == pytest.approx(2 * 1 * 0.8 / 1.8, abs=1e-6)
    assert metrics["rouge2"] == 0
    assert metrics["rougel"] == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-6)


def test_repeated_characters_count_as_often_as_they_stand():
    # a a a against a b: one a in common (P 1/3, R 1/2)
    metrics = compute_metrics(["aaa"], ["ab"])
    assert metrics["rouge1"] == metrics["rougel"] == pytest.approx(0.4, abs=1e-6)


def test_bleu_by_hand():
    # Corpus of two: abcde against abcdf, xyzw against xyzw. Matches 4+4 of 9, 3+3 of 7, 2+2 of 5, 1+1 of 3; both
    # lengths are 9, so no brevity penalty.
    metrics = compute_metrics(["abcde", "xyzw"], ["abcdf", "xyzw"])
    assert metrics["bleu4"] == pytest.approx((8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25, abs=1e-9)
    # A prediction of 4 for a reference of 6: all its n-grams match, and brevity costs e ** (1 - 6 / 4).
    assert compute_metrics(["abcd"], ["abcdef"])["bleu4"] == pytest.approx(math.exp(-0.5), abs=1e-9)


def test_perfect_and_empty():
    text = "3.5元在哪里？"
    perfect = compute_metrics([text, text], [text, text])
    assert all(value == pytest.approx(1, abs=1e-6) for value in perfect.values())
    assert compute_metrics(["", " "], ["什么", "哪里"]) == {"rouge1": 0, "rouge2": 0, "rougel": 0, "bleu4": 0}
    half = compute_metrics(["", text], ["什么", text])
    assert half["rougel"] == pytest.approx(0.5, abs=1e-6)


def test_width_and_spaces_do_not_count():
    assert compute_metrics(["谁 写了A?"], ["谁写了Ａ？"])["rougel"] == pytest.approx(1, abs=1e-6)


def test_a_full_stop_does_not_split_the_text():
    # One character of three in common; as sentences "5" and "3", in either order, they would all match.
    assert compute_metrics(["5.3"], ["3.5"])["rougel"] == pytest.approx(1 / 3, abs=1e-6)


def test_long_texts():
    assert compute_metrics(["甲乙丙丁" * 300], ["甲乙丙丁" * 300])["rougel"] == pytest.approx(1, abs=1e-6)
