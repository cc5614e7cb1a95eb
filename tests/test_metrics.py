import math

import pytest

from glm import metrics
from glm.metrics import compute_metrics


def test_by_hand():
    # Characters 甲乙丙丁 against 甲丙乙丁戊: 1-grams share 4 (P 4/4, R 4/5); 2-grams none; the
    # longest common subsequence is 甲乙丁 or 甲丙丁, 3 long (P 3/4, R 3/5).
    found = compute_metrics(["甲乙丙丁"], ["甲丙乙丁戊"])
    assert found["rouge1"] == pytest.approx(2 * 1 * 0.8 / 1.8, abs=1e-6)
    assert found["rouge2"] == 0
    assert found["rougel"] == pytest.approx(2 * 0.75 * 0.6 / 1.35, abs=1e-6)


def test_repeated_characters_count_as_often_as_they_stand():
    # One 甲 in common (P 1/3, R 1/2)
    found = compute_metrics(["甲甲甲"], ["甲乙"])
    assert found["rouge1"] == found["rougel"] == pytest.approx(0.4, abs=1e-6)


def test_bleu_by_hand():
    # Corpus of two: 甲乙丙丁戊 against 甲乙丙丁己, 子丑寅卯 against itself. Matches 4+4 of 9, 3+3 of 7,
    # 2+2 of 5, 1+1 of 3; both lengths are 9, so no brevity penalty.
    found = compute_metrics(["甲乙丙丁戊", "子丑寅卯"], ["甲乙丙丁己", "子丑寅卯"])
    assert found["bleu4"] == pytest.approx((8 / 9 * 6 / 7 * 4 / 5 * 2 / 3) ** 0.25, abs=1e-9)
    # A prediction of 4 for a reference of 6: all its n-grams match, and brevity costs e ** (1 - 6 / 4).
    assert compute_metrics(["甲乙丙丁"], ["甲乙丙丁戊己"])["bleu4"] == pytest.approx(math.exp(-0.5), abs=1e-9)


def test_perfect_and_empty():
    text = "3.5元在哪里？"
    perfect = compute_metrics([text, text], [text, text])
    assert all(value == pytest.approx(1, abs=1e-6) for value in perfect.values())
    assert compute_metrics(["", " "], ["什么", "哪里"]) == {"rouge1": 0, "rouge2": 0, "rougel": 0, "bleu4": 0}
    half = compute_metrics(["", text], ["什么", text])
    assert half["rougel"] == pytest.approx(0.5, abs=1e-6)


def test_a_record_is_scored_once(monkeypatch):
    """What its row says of it is what the means are of."""
    texts = ["甲乙丙丁", "5.3", ""], ["甲丙乙丁戊", "3.5", "什么"]
    scores = [metrics.rouge(*pair) for pair in zip(*texts)]
    expected = compute_metrics(*texts)
    monkeypatch.setattr(metrics, "rouge", None)
    assert compute_metrics(*texts, scores) == expected


def test_width_and_spaces_do_not_count():
    assert compute_metrics(["谁 写了A?"], ["谁写了Ａ？"])["rougel"] == pytest.approx(1, abs=1e-6)


def test_a_full_stop_does_not_split_the_text():
    # One character of three in common; as sentences "5" and "3", in either order, they would all match.
    assert compute_metrics(["5.3"], ["3.5"])["rougel"] == pytest.approx(1 / 3, abs=1e-6)


def test_long_texts():
    assert compute_metrics(["甲乙丙丁" * 300], ["甲乙丙丁" * 300])["rougel"] == pytest.approx(1, abs=1e-6)


def test_a_run_of_latin_letters_or_digits_counts_once():
    """As the published figures count, in any case and width: 在 2023 年 的 nature 上 against 在 2024 年."""
    found = compute_metrics(["在２０２３年的Nature上"], ["在2024年"])
    assert found["rouge1"] == pytest.approx(2 * (2 / 6) * (2 / 3) / (2 / 6 + 2 / 3), abs=1e-6)
    assert compute_metrics(["NATURE"], ["nature"])["rouge1"] == pytest.approx(1, abs=1e-6)
    assert compute_metrics(["natures"], ["nature"])["rouge1"] == 0
