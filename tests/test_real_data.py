"""The published DuReaderQG dev file, as PaddleNLP's cache holds it, where it lies beside the checkout."""

import json
import math
import re
import shutil
import unicodedata
from collections import Counter

import numpy as np
import pytest
from helpers import ROOT
from paddlenlp.datasets import dureader_qg

from data import build_dataset, decode_target, encode_text
from glm.metrics import compute_metrics
from glm.records import read_records

DEV = ROOT.parent / "shared/data/DuReaderQG/dev.json"
pytestmark = pytest.mark.skipif(not DEV.is_file(), reason="the published DuReaderQG dev file is not here")


@pytest.fixture
def records(tmp_path, monkeypatch):
    (tmp_path / "DuReaderQG").mkdir()
    shutil.copy(DEV, tmp_path / "DuReaderQG")
    monkeypatch.setattr(dureader_qg, "DATA_HOME", str(tmp_path))
    return read_records("dureader_qg", "dev")


def test_records_and_features(records, tokenizer):
    rows = [json.loads(line) for line in DEV.read_text(encoding="utf-8").splitlines()]
    assert len(records) == len(rows) == 984 and records[752]["answer"] == ""
    for row, record in zip(rows, records):
        assert all(record[name] == row[name] for name in ("context", "answer", "question"))
    dataset = build_dataset(tokenizer, records, 608, 160)
    assert [features["index"] for features in dataset] == list(range(984))
    cut = 0
    for features in dataset:
        record, length = features["record"], features["source_length"]
        source = features["input_ids"][:length].tolist()
        whole = encode_text(tokenizer, f"答案：{record['answer']}，上下文：{record['context']}")
        assert source == [
            tokenizer.cls_token_id,
            *whole[:605],
            tokenizer.gmask_token_id,
            tokenizer.eos_token_id,
        ]
        cut += len(whole) > 605
        assert features["labels"][-1] == tokenizer.eop_token_id and len(features["labels"]) <= 160
        assert len(features["input_ids"]) == length + len(features["labels"])
    assert 0 < cut < 100


def test_what_a_user_sees_of_unknown_characters(records, tokenizer):
    """They are left out; all others stay, in their order, and a question without any stays whole."""
    unknown = {False: 0, True: 0}
    for record in records[:300]:
        question = re.sub(r"\s", "", unicodedata.normalize("NFKC", record["question"]))
        (features,) = build_dataset(tokenizer, [record], 608, 160)
        text = iter(re.sub(r"\s", "", decode_target(tokenizer, features["labels"])))
        left = next(text, None)
        missing = []
        for character in question:
            if character == left:
                left = next(text, None)
            else:
                missing.append(character)
        assert left is None, record
        has_unknown = tokenizer.unk_token_id in features["labels"]
        assert bool(missing) == has_unknown, (record, missing)
        unknown[has_unknown] += 1
    assert all(unknown.values())  # the tiny tokenizer knows few characters


def words(text):
    return re.findall(r"[a-z0-9]+|[^\sa-z0-9]", unicodedata.normalize("NFKC", text).lower())


def test_metrics_against_an_independent_count(records):
    """Each question against another's: n-grams counted here, the subsequence by dynamic programming."""
    plain = [
        record["question"]
        for record in records
        if re.fullmatch(r"[一-鿿a-zA-Z0-9？?，、。 ]+", record["question"])
    ]
    predictions, references = plain, [plain[-1], *plain[:-1]]
    rouge, matches, totals, lengths = np.zeros(3), np.zeros(4), np.zeros(4), np.zeros(2)
    for prediction, reference in zip(map(words, predictions), map(words, references)):
        for n in range(1, 5):
            ours, theirs = (Counter(zip(*(text[i:] for i in range(n)))) for text in (prediction, reference))
            common = sum((ours & theirs).values())
            matches[n - 1] += common
            totals[n - 1] += sum(ours.values())
            if n <= 2 and common:
                rouge[n - 1] += 2 * common / (sum(ours.values()) + sum(theirs.values()))
        table = np.zeros([len(prediction) + 1, len(reference) + 1], int)
        for i, word in enumerate(prediction):
            for j, other in enumerate(reference):
                table[i + 1, j + 1] = (
                    table[i, j] + 1 if word == other else max(table[i, j + 1], table[i + 1, j])
                )
        rouge[2] += 2 * table[-1, -1] / (len(prediction) + len(reference))
        lengths += len(prediction), len(reference)
    bleu = math.exp(np.log(matches / totals).mean() + min(0, 1 - lengths[1] / lengths[0]))
    metrics = compute_metrics(predictions, references)
    assert len(plain) > 500 and bleu > 0.01
    assert metrics["bleu4"] == pytest.approx(bleu, rel=1e-6)
    np.testing.assert_allclose(
        [metrics["rouge1"], metrics["rouge2"], metrics["rougel"]], rouge / len(plain), atol=1e-4
    )
