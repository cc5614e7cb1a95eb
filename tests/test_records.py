"""Records in the forms that people have them in: one line, SQuAD's lists, nested files."""

import json

import pytest

from data import build_dataset
from glm.errors import InputError
from glm.records import parse_lines, read_records

CONTEXT = "明霜峰高1205米。爬明霜峰大约需要11小时。"
QAS = [
    {"id": "a", "question": "有多高？", "answers": [{"text": "1205米", "answer_start": 4}]},
    {"question": "要多久？", "answers": [{"text": "11小时"}, {"text": "小时"}]},
    {"id": "c", "question": "在哪里？", "answers": [], "is_impossible": True},
    {"id": "d", "question": "贵吗？", "answers": [{"text": "峰"}], "is_impossible": True},
]
NESTED = {
    "version": "1",
    "data": [
        {"title": "空", "paragraphs": []},
        {"title": "明霜峰", "paragraphs": [{"context": CONTEXT, "qas": QAS}]},
    ],
}


def parse(*rows, require_question=True):
    lines = [json.dumps(row, ensure_ascii=False).encode() for row in rows]
    return list(parse_lines(lines, "f.json", require_question))


@pytest.mark.parametrize(
    "fields, answer",
    [
        ({"answer": "一", "title": "题"}, "一"),
        ({"title": "题"}, "题"),
        ({"answers": ["一", "二"], "title": "题"}, "一"),
        ({"answers": "一", "title": "题"}, "一"),
        ({"answers": [{"text": "一", "answer_start": 0}], "title": "题"}, "一"),
        ({"answers": {"text": ["一", "二"], "answer_start": [0, 4]}, "title": "题"}, "一"),
        ({"answers": {"text": "一"}, "title": "题"}, "一"),
        ({"answer": "一", "answers": ["二"]}, "一"),
        ({"answer": None, "answers": ["二"]}, "二"),
        ({"answers": {"text": [], "answer_start": []}, "title": "题"}, None),
        ({"answers": [], "title": "题"}, None),
    ],
)
def test_the_answer_of_a_row(fields, answer):
    (record,) = parse({"context": CONTEXT, "question": "问？", **fields})
    assert record["answer"] == answer and record["context"] == CONTEXT


@pytest.mark.parametrize(
    "answers", [7, None, {}, {"texts": ["一"]}, [7], [None], [{"text": 7}], [{"t": "一"}], {"text": 7}]
)
def test_answers_that_are_none(answers):
    with pytest.raises(InputError, match="^f.json:1: the field 'answer' is"):
        parse({"context": CONTEXT, "question": "问？", "title": "题", "answers": answers})


@pytest.mark.parametrize("indent, place", [(None, "train.json:1"), (1, "train.json"), (4, "train.json")])
def test_a_nested_file(tmp_path, indent, place, tokenizer):
    text = json.dumps(NESTED, ensure_ascii=False, indent=indent)
    for mark in ("", "\ufeff", "\n \n"):
        (tmp_path / "train.json").write_text(mark + text, encoding="utf-8")
        records = read_records(str(tmp_path), "train")
        assert [(r["id"], r["answer"], r["question"]) for r in records] == [
            ("a", "1205米", "有多高？"),
            (1, "11小时", "要多久？"),
        ]
    assert records[0]["context"] is records[1]["context"] or records[0]["context"] == CONTEXT
    assert len(build_dataset(tokenizer, records, 64, 32)) == 2


def test_places_in_a_nested_file(tmp_path):
    wrong = json.loads(json.dumps(NESTED))
    wrong["data"][1]["paragraphs"][0]["qas"][1]["question"] = " "
    (tmp_path / "dev.json").write_text(json.dumps(wrong, indent=2))
    with pytest.raises(InputError) as error:
        read_records(str(tmp_path), "dev")
    place = f"{tmp_path}/dev.json data[1].paragraphs[0].qas[1]: the field 'question' is empty"
    assert str(error.value).startswith(place)
    (tmp_path / "dev.json").write_text(json.dumps({"data": [{"paragraphs": [{"qas": [3]}]}]}))
    with pytest.raises(InputError, match=r"dev.json:1 data\[0\].paragraphs\[0\].qas\[0\]: a int"):
        read_records(str(tmp_path), "dev")


def test_lines_with_paragraphs_of_their_own():
    records = parse(
        {"context": CONTEXT, "qas": QAS[:2]}, {"context": "二", "answer": "二", "question": "几？"}
    )
    assert [record["id"] for record in records] == ["a", 1, 2]
    assert records[1]["where"] == "f.json:1 qas[1]" and records[2]["where"] == "f.json:2"


def test_lists_in_a_record_are_no_levels():
    (record,) = parse({"context": "c", "answer": "a", "data": [1]}, require_question=False)
    assert record["answer"] == "a" and record["question"] is None


def test_questions_without_an_answer_are_counted(tmp_path, monkeypatch):
    from glm import records

    told = []
    monkeypatch.setattr(records.logger, "warning", told.append)
    (tmp_path / "dev.json").write_text(json.dumps(NESTED))
    read_records(str(tmp_path), "dev")
    (line,) = told
    assert line.startswith("2 of 4 questions have no answer") and line.endswith("paragraphs[0].qas[2]")


@pytest.mark.parametrize(
    "line, message",
    [
        (b"\x1a", "f.json:1: not JSON: it holds the character U.001A, DOS's mark"),
        (b'{"context": "c"}\x1a', "U.001A, DOS's mark"),
        (b'{"context": "a\0b"}', "the character U.0000: take it out, or escape it"),
        (b'{\0"\0', "the character U.0000: take it out, or escape it"),
        (b'{"context": "a\tb"}', "the character U.0009: take it out, or escape it"),
        ('{“context”: "c"}'.encode(), "not JSON .Expecting property name"),
    ],
)
def test_characters_that_are_not_seen_are_named(line, message):
    with pytest.raises(InputError, match=message):
        list(parse_lines([line], "f.json", True))
