import json
import re
import threading
import time
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import MINI, ROOT
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import data
from data import (
    DataCollator,
    build_attention_mask,
    build_dataset,
    build_features,
    build_position_ids,
    decode_target,
    encode_source,
    encode_target,
    encode_text,
)
from glm.errors import InputError
from glm.records import parse_lines, read_in_batches, read_records
from glm.training.sampler import GroupedBatchSampler

OPENING = "在已知答案的前提下，问题："
RECORD = {
    "context": "白云山海拔1200米。",
    "answer": "1200米",
    "question": "白云山海拔多少米？",
    "where": "here:1",
}


def peer_features(tokenizer, record, tgt_length):
    """The same record as PaddleNLP's own tokenizer builds it, of one row, unpadded."""
    text = f"答案：{record['answer']}，上下文：{record['context']}"
    source = tokenizer(text)["input_ids"]
    source = np.array([[*source[:-1], tokenizer.gmask_token_id, source[-1]]], dtype="int64")

    class Source:
        input_ids, attention_mask = source, np.ones_like(source)

    return tokenizer.build_inputs_for_generation(
        Source, max_gen_length=tgt_length, targets=[OPENING + record["question"]], padding=False
    )


def check_against_peer(tokenizer, records):
    for record in records:
        source_ids, labels = (
            encode_source(tokenizer, record, 1000)[0],
            encode_target(tokenizer, record["question"], 200)[0],
        )
        features = build_features(tokenizer, source_ids, labels)
        peer = peer_features(tokenizer, record, 200)
        np.testing.assert_array_equal(features["input_ids"], peer["input_ids"][0])
        np.testing.assert_array_equal(features["labels"], peer["label_ids"][0, len(source_ids) :])
        length = len(features["input_ids"])
        positions = build_position_ids([len(source_ids)], [length], length)
        np.testing.assert_array_equal(positions, peer["position_ids"])
        mask = build_attention_mask([len(source_ids)], [length], length)
        np.testing.assert_array_equal(mask, peer["attention_mask"].astype(bool))


def test_features_equal_paddlenlp(tokenizer):
    check_against_peer(tokenizer, read_records(str(MINI), "dev"))


def test_features_equal_paddlenlp_with_the_real_tokenizer(real_tokenizer):
    tokenizer = real_tokenizer
    assert (tokenizer.sop_token_id, tokenizer.eop_token_id, tokenizer.gmask_token_id) == (50006, 50007, 50009)
    check_against_peer(tokenizer, read_records(str(MINI), "dev"))
    labels, _ = encode_target(tokenizer, "谁写了Hello World 2020？", 160)
    assert decode_target(tokenizer, labels[:-1]) == "谁写了Hello World 2020?"
    # 608 ids of a long passage: cut at the end of the context, answer and [gMASK] kept
    record = {**RECORD, "context": "中国人民在今天的天气里。" * 400}
    source_ids, cut = encode_source(tokenizer, record, 608)
    whole, uncut = encode_source(tokenizer, record, 10**6)
    assert cut and not uncut
    assert len(source_ids) == 608 and source_ids[:606] == whole[:606] and source_ids[606:] == [50009, 50000]


def losses_of(monkeypatch, tokenizer, records, src_length, tgt_length):
    """What build_dataset says that it lost: (number, sentence, place) of each line."""
    told = []
    monkeypatch.setattr(data.logger, "warning", told.append)
    build_dataset(tokenizer, records, src_length, tgt_length)
    pattern = rf"(\d+) of {len(records)} (.*), the first at (.*)"
    return [re.fullmatch(pattern, line).groups() for line in told]


def test_what_is_lost_is_counted(monkeypatch, tokenizer):
    long = {**RECORD, "context": "白云山。" * 30 + RECORD["context"], "where": "f:2"}
    records = [RECORD, long, {**long, "where": "f:3"}, {**RECORD, "question": "龘？", "where": "f:4"}]
    whole = len(encode_source(tokenizer, long, 10**6)[0])
    longest = len(encode_target(tokenizer, RECORD["question"], 160)[0])
    unknown = ("1", "targets have characters that the tokenizer does not know", "f:4")
    # Lengths that are just enough lose nothing.
    assert losses_of(monkeypatch, tokenizer, records, whole, longest) == [unknown]
    assert losses_of(monkeypatch, tokenizer, records, whole - 1, longest - 1) == [
        ("3", f"targets are cut at --tgt_length {longest - 1}", "here:1"),
        ("2", f"passages are cut at --src_length {whole - 1}", "f:2"),
        unknown,
    ]
    found = losses_of(monkeypatch, tokenizer, records, 60, longest)
    assert ("2", "passages lose their answer, cut at --src_length 60", "f:2") in found
    rows = [{**RECORD, "context": "龘" + RECORD["context"], "question": None}]
    ((number, sentence, _),) = losses_of(monkeypatch, tokenizer, rows, 60, longest)
    assert number == "1" and sentence.startswith("sources have characters")


@pytest.mark.parametrize("name, lost, unknown", [("DuReaderQG/dev", 31, 2), ("cmrc2018/train", 423, 105)])
def test_what_real_records_lose(monkeypatch, real_tokenizer, name, lost, unknown):
    """DuReaderQG's and CMRC 2018's records at --src_length 256."""
    path = ROOT.parent / f"shared/data/{name}.json"
    if not path.is_file():
        pytest.skip(f"{name}.json is not here")
    records = read_records(str(path), "test")
    found = losses_of(monkeypatch, real_tokenizer, records, 256, 160)
    numbers = {sentence.split(",")[0]: int(number) for number, sentence, _ in found}
    assert numbers["passages lose their answer"] == lost
    assert numbers["targets have characters that the tokenizer does not know"] == unknown


def test_truncation_keeps_answer_mask_and_end(tokenizer):
    record = {**RECORD, "context": RECORD["context"] * 30}
    whole, cut = encode_source(tokenizer, record, 10**6)[0], encode_source(tokenizer, record, 40)[0]
    assert len(cut) == 40 and cut[:38] == whole[:38]
    assert cut[38:] == [tokenizer.gmask_token_id, tokenizer.eos_token_id]
    assert record["answer"] in tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(cut[1:38]))
    labels, _ = encode_target(tokenizer, "很长的问题" * 20, 12)
    assert len(labels) == 12 and labels[-1] == tokenizer.eop_token_id
    with pytest.raises(InputError, match="here:1.*src_length 20"):
        encode_source(tokenizer, {**RECORD, "answer": "答" * 30}, 20)


def test_an_answer_that_nfkc_lengthens_leaves_room_or_is_refused(tokenizer):
    """Such as U+33AF, which is six characters."""
    record = {**RECORD, "answer": "\u33af" * 20}
    with pytest.raises(InputError, match="here:1: prompt and answer take .* more than --src_length 80"):
        encode_source(tokenizer, record, 80)
    source_ids, cut = encode_source(tokenizer, record, 160)
    assert "passages" not in str(cut) and len(source_ids) > 120


def test_what_is_said_of_the_opening(monkeypatch, tokenizer):
    """The labels' end token is not counted: the minimum is of tokens before it."""
    said = []
    monkeypatch.setattr(data.logger, "warning", said.append)
    monkeypatch.setattr(data.logger, "eval", said.append)
    opening = len(encode_text(tokenizer, OPENING))

    def describe(least, ngram=3):
        said.clear()
        generation = SimpleNamespace(min_tgt_length=least, no_repeat_ngram_size=ngram)
        data.describe_generation(tokenizer, generation, [{"labels": [1] * 5}, {"labels": [1] * 30}])
        return " ".join(said)

    assert describe(0) == ""
    assert f"counts the {opening} tokens" in describe(29) and f"at least {29 - opening}" in said[0]
    assert "--min_tgt_length 30 is over the longest target" in describe(30) and "has 29 tokens" in said[0]
    assert "--no_repeat_ngram_size 1" in describe(0, ngram=1)


def test_special_tokens_in_text_stay_text(tokenizer):
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text = "".join(tokenizer.all_special_tokens)
    assert not special & set(encode_text(tokenizer, text))
    source_ids, _ = encode_source(tokenizer, {**RECORD, "context": text, "answer": text}, 500)
    assert [i for i in source_ids if i in special] == [
        tokenizer.cls_token_id,
        tokenizer.gmask_token_id,
        tokenizer.eos_token_id,
    ]


def test_decode_target_takes_the_opening_off(tokenizer):
    labels, _ = encode_target(tokenizer, RECORD["question"], 160)
    assert decode_target(tokenizer, labels[:-1]) == "白云山海拔多少米?"  # sentencepiece writes ？ as ?
    assert decode_target(tokenizer, []) == ""
    beyond = [len(tokenizer), len(tokenizer) + 3]  # ids of the model's padded vocabulary
    assert decode_target(tokenizer, [tokenizer.pad_token_id, *labels, *beyond]) == "白云山海拔多少米?"


def test_positions_by_hand(tokenizer):
    features = build_features(tokenizer, [9, 8, 7, 6], [5, 4, 3])
    sop = tokenizer.sop_token_id
    assert features["input_ids"].tolist() == [9, 8, 7, 6, sop, 5, 4]
    assert features["labels"].tolist() == [5, 4, 3]
    unanswered = build_features(tokenizer, [9, 8, 7, 6], [])
    assert unanswered["input_ids"].tolist() == [9, 8, 7, 6] and unanswered["labels"].shape == (0,)
    first, second = build_position_ids([4, 3], [7, 3], 8).tolist()
    assert first == [[0, 1, 2, 3, 2, 2, 2, 0], [0, 0, 0, 0, 1, 2, 3, 0]]
    assert second == [[0, 1, 2, 0, 0, 0, 0, 0], [0] * 8]


def test_a_record_takes_little_room(tokenizer):
    """Beside its text, at DuReaderQG's lengths, 1.5 KB at most; the largest id stays what it is."""
    rng = np.random.default_rng(0)
    ids = [(rng.integers(0, 50009, 188).tolist(), rng.integers(0, 50009, 13).tolist()) for _ in range(500)]
    tracemalloc.start()
    dataset = [
        {**build_features(tokenizer, *pair), "index": index, "record": None} for index, pair in enumerate(ids)
    ]
    size = tracemalloc.get_traced_memory()[0] / len(ids)
    tracemalloc.stop()
    assert 400 < size < 1500 and len(dataset) == 500
    features = build_features(tokenizer, [9, 70_000, 7, 6], [65_536])
    assert features["input_ids"][1] == 70_000 and features["labels"][0] == 65_536


class Slow:
    """Records of which some come late."""

    def __init__(self, *records):
        self.records, self.gate = records, threading.Event()

    def __iter__(self):
        for record in self.records:
            if record == "wait":
                self.gate.wait(30)
            elif isinstance(record, Exception):
                raise record
            else:
                yield record


def test_batches_of_what_is_there():
    """None larger than asked for, in order; none waits for more than one; a mistake comes last."""
    batches = list(read_in_batches(range(100), 8))
    assert [record for batch in batches for record in batch] == list(range(100)) and max(
        map(len, batches)
    ) <= 8
    batches = read_in_batches(range(100), 8)
    assert next(batches)[0] == 0
    time.sleep(2)
    assert len(next(batches)) == 8  # all that are wanted are there by now
    slow = Slow(1, 2, "wait", 3, ValueError("no more"))
    batches, seen = read_in_batches(slow, 8), []
    while len(seen) < 2:
        seen += next(batches)
    assert seen == [1, 2]  # before the third is there
    slow.gate.set()
    assert next(batches) == [3]
    with pytest.raises(ValueError, match="no more"):
        next(batches)
    assert list(read_in_batches([], 8)) == []


def test_mask_by_hand():
    mask = build_attention_mask([2], [4], 5)[0, 0].astype(int)
    assert mask[:4].tolist() == [[1, 1, 0, 0, 0], [1, 1, 0, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]
    assert mask[:, 4].sum() == 0  # nobody sees the padding


def test_collator_pads_to_a_multiple_of_8_and_marks_the_targets(tokenizer):
    features = [
        {**build_features(tokenizer, list(range(10, 16)), [5, 4, 3]), "index": 7},
        {**build_features(tokenizer, list(range(20, 23)), [6, 5]), "index": 2},
    ]
    batch = DataCollator(pad_token_id=99)(features)
    assert batch["input_ids"].shape == (2, 16) and batch["position_ids"].shape == (2, 2, 16)
    assert batch["attention_mask"].shape == (2, 1, 16, 16)
    assert (batch["input_ids"][0, 9:] == 99).all() and (batch["input_ids"][1, 5:] == 99).all()
    assert batch["labels"].tolist() == [5, 4, 3, 6, 5]
    assert batch["target_positions"].tolist() == [6, 7, 8, 16 + 3, 16 + 4]
    assert batch["source_length"].tolist() == [6, 3] and batch["index"].tolist() == [7, 2]
    sop = tokenizer.sop_token_id
    assert batch["input_ids"].reshape(-1)[batch["target_positions"]].tolist() == [sop, 5, 4, sop, 6]


def test_both_published_forms_of_a_record(tmp_path):
    rows = [
        {"context": "c", "answer": "a", "question": "q", "id": "x7"},
        {"source": "c", "title": "a", "target": "q"},
    ]
    (tmp_path / "train.json").write_text("\n".join(map(json.dumps, rows)) + "\n\n", encoding="utf-8")
    records = read_records(str(tmp_path), "train")
    assert [r["id"] for r in records] == ["x7", 1]
    assert all((r["context"], r["answer"], r["question"]) == ("c", "a", "q") for r in records)
    (tmp_path / "test.json").write_text('\ufeff{"context": "c", "answer": "a"}', encoding="utf-8")
    assert read_records(str(tmp_path), "test", require_target=False)[0]["question"] is None


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "no records"),
        (b'{"context": "c", "answer": "a", "question": "q"}\n{"context": ', r"train.json:2: not JSON"),
        (b'{"context": "c", "answer": "a", "question": "q"}\n\xff\xfe', r"train.json:2: byte 1 is not UTF-8"),
        (b'["context"]', r"train.json:1: a list"),
        (b'{"context": "c", "question": "q"}', r"train.json:1: the field 'answer' is missing"),
        (b'{"context": "c", "answer": "a"}', r"train.json:1: the field 'question' is missing"),
        (b'{"context": "c", "answer": 7, "question": "q"}', r"train.json:1: the field 'answer' is a int"),
        (b'{"context": "c", "answer": "a", "question": " "}', r"train.json:1: the field 'question' is empty"),
    ],
)
def test_bad_files_name_file_and_line(tmp_path, content, message):
    (tmp_path / "train.json").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_records(str(tmp_path), "train")


def test_missing_files():
    with pytest.raises(
        InputError, match="nowhere is neither a folder nor one of dureader_qg, cmrc2018, drcd"
    ):
        read_records("nowhere", "train")
    with pytest.raises(InputError, match="dureader_qg has no test split"):
        read_records("dureader_qg", "test")


def test_fixture_records(tokenizer):
    """The shipped data is what is said of it: sizes, no leaks, mostly unseen names, 12 relations or more."""
    splits = {split: read_records(str(MINI), split) for split in ("train", "dev", "test")}
    assert [len(records) for records in splits.values()] == [2000, 60, 20]
    train = {record["context"] for record in splits["train"]}
    assert not train & {record["context"] for split in ("dev", "test") for record in splits[split]}
    assert all(r["context"].count(r["answer"]) == 1 for records in splits.values() for r in records)
    trained = {record["question"] for record in splits["train"]}
    assert sum(record["question"] not in trained for record in splits["dev"]) >= 50
    dataset = build_dataset(tokenizer, splits["dev"], 160, 48)
    assert [feature["index"] for feature in dataset] == list(range(60))
    assert all(tokenizer.unk_token_id not in feature["input_ids"] for feature in dataset)


def make_sampler(lengths, batch_size, num_replicas=1, rank=0, **changes):
    dataset = [{"input_ids": np.zeros(length), "labels": np.zeros(length // 9)} for length in lengths]
    options = {"global_batch_size": 8, "shuffle": True, "group_by_length": True, "seed": 5, **changes}
    return GroupedBatchSampler(dataset, batch_size, num_replicas, rank, **options)


@pytest.mark.parametrize("group_by_length", [True, False])
def test_one_order_of_batches_on_any_layout(group_by_length):
    lengths = np.random.default_rng(0).integers(10, 600, 901)
    steps = {}
    for batch_size, num_replicas in ((8, 1), (4, 2), (2, 4), (2, 2), (1, 2)):  # the last two accumulate
        samplers = [
            make_sampler(lengths, batch_size, num_replicas, rank, group_by_length=group_by_length)
            for rank in range(num_replicas)
        ]
        for sampler in samplers:
            sampler.set_epoch(3)
        batches = [list(sampler) for sampler in samplers]
        assert all(len(b) == len(s) for b, s in zip(batches, samplers))
        passes = 8 // (batch_size * num_replicas)
        steps[batch_size, num_replicas] = [
            [
                sorted(
                    sum(
                        (batch for rank in batches for batch in rank[step * passes : (step + 1) * passes]), []
                    )
                )
            ]
            for step in range(113)
        ]
    assert all(value == steps[8, 1] for value in steps.values())
    seen = np.concatenate([step[0] for step in steps[8, 1]])
    assert len(seen) == 904 and set(seen) == set(range(901))  # three records fill up the last batch
    targets = [sum(length // 9 for length in lengths[step[0]]) for step in steps[8, 1]]
    assert samplers[0].target_tokens.tolist() == targets


def test_batches_are_alike_in_length_and_new_each_epoch():
    lengths = np.random.default_rng(0).integers(10, 600, 2000)
    padding = {}
    for group_by_length in (True, False):
        batches = make_sampler(lengths, 8, group_by_length=group_by_length).global_batches()
        padding[group_by_length] = (lengths[batches].max(1, keepdims=True) - lengths[batches]).sum()
    assert padding[True] < 0.1 * padding[False]
    sampler = make_sampler(lengths, 8)
    first = list(sampler)
    assert list(sampler) == first
    sampler.set_epoch(1)
    assert sorted(map(sorted, sampler)) != sorted(map(sorted, first))
    longest = lengths[np.concatenate(first)].reshape([-1, 8]).max(1)
    assert (np.diff(longest) > 0).sum() > 50  # neither sorted nor nearly so


def test_evaluation_order_is_from_long_to_short():
    batches = list(make_sampler([5, 9, 7, 1, 3], 2, shuffle=False, global_batch_size=2))
    assert batches == [[1, 2], [0, 4], [3, 1]]


SPECIAL = [
    "[gMASK]",
    "[CLS]",
    "<|endoftext|>",
    "<|startofpiece|>",
    "<|endofpiece|>",
    "[MASK]",
    "[sMASK]",
    "[UNUSED1]",
]


ODD = [
    "",
    " ",
    "\t\r",
    "\0",
    "\x1b[31m",
    "😀",
    "👩‍👩‍👧",
    "مرحبا",
    "\u202e反",
    "e\u0301",
    "\ud800",
    "\ufeff",
    "�",
    "▁",
    "长" * 100_000,
]


TEXT = st.lists(st.one_of(st.sampled_from(SPECIAL + ODD), st.text(max_size=20)), max_size=4).map("".join)


VALUE = st.one_of(TEXT, st.none(), st.integers(), st.booleans(), st.floats(), st.lists(TEXT, max_size=2))


FIELDS = st.sampled_from(["context", "answer", "question", "source", "title", "target", "id", "other"])


LINE = st.one_of(
    st.builds(lambda *row: json.dumps(dict(zip(RECORD, row))).encode(), TEXT, TEXT, TEXT),
    st.dictionaries(FIELDS, VALUE, max_size=8).map(lambda row: json.dumps(row).encode()),
    st.binary(max_size=40),
    TEXT.map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.just(json.dumps(RECORD, ensure_ascii=False).encode("utf-16")),
)


@settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck))
@given(lines=st.lists(LINE, min_size=1, max_size=3), cut=st.integers(0, 60), require_question=st.booleans())
def test_a_line_gives_features_or_one_line(tokenizer, lines, cut, require_question):
    lines[-1] = lines[-1][: len(lines[-1]) - cut] if cut < 20 else lines[-1]  # torn, sometimes
    try:
        records = list(parse_lines(lines, "data.json", require_question))
        dataset = build_dataset(tokenizer, records, 64, 32)
    except InputError as error:
        assert str(error).startswith("data.json:")
        return
    special = {*tokenizer.all_special_ids, *range(tokenizer.eos_token_id, len(tokenizer))} - {
        tokenizer.unk_token_id
    }
    for features in dataset:
        ids, source, labels = (
            features["input_ids"].tolist(),
            features["source_length"],
            features["labels"].tolist(),
        )
        assert 3 < source <= 64 and len(labels) <= 32 and len(ids) == source + len(labels)
        frame = [tokenizer.cls_token_id, tokenizer.gmask_token_id, tokenizer.eos_token_id]
        assert [ids[0], ids[source - 2], ids[source - 1]] == frame
        assert not special & {*ids[1 : source - 2], *ids[source + 1 :], *labels[:-1]}
        if labels:
            assert labels[-1] == tokenizer.eop_token_id and ids[source] == tokenizer.sop_token_id
        else:
            assert features["record"]["question"] is None and not require_question
    if dataset:
        batch = DataCollator(tokenizer.pad_token_id)(dataset)
        assert len(batch["labels"]) == sum(len(features["labels"]) for features in dataset)


def test_every_odd_text_alone(tokenizer):
    for text in [*SPECIAL, *ODD]:
        row = {"context": text, "answer": text[:10], "question": f"问{text}"}
        records = list(parse_lines([json.dumps(row).encode()], "data.json", True))
        assert build_dataset(tokenizer, records, 64, 32)[0]["labels"][-1] == tokenizer.eop_token_id


def test_the_fixtures_are_valid(tokenizer):
    for split in ("train", "dev", "test"):
        with open(MINI / f"{split}.json", "rb") as lines:
            assert build_dataset(tokenizer, list(parse_lines(lines, split, True)), 160, 48)
