"""Records in the forms that people have them in: one line, SQuAD's lists, nested files."""

import functools
import io
import json
import os
import threading

import pytest

from data import build_dataset
from glm import records
from glm.errors import InputError
from glm.records import BlankLine, parse_each_line, parse_lines, read_lines, read_records

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
        ({"source": CONTEXT, "title": "题"}, "题"),
        ({"source": CONTEXT, "answer": None, "title": "题"}, "题"),
        ({"source": "二", "answer": "一", "title": "题"}, "一"),
    ],
)
def test_the_answer_of_a_row(fields, answer):
    (record,) = parse({"context": CONTEXT, "question": "问？", **fields})
    assert record["answer"] == answer and record["context"] == CONTEXT


def test_a_question_without_an_answer():
    """It is left out of a file, and a mistake in a pipe."""
    for answers in ([], {"text": [], "answer_start": []}):
        row = {"context": CONTEXT, "question": "问？", "answers": answers, "title": "题"}
        assert parse(row) == []
        (error,) = parse_each_line([json.dumps(row).encode()], "f")
        assert str(error) == "f:1: the question has no answer: give one"


@pytest.mark.parametrize(
    "answers", [7, None, {}, {"texts": ["一"]}, [7], [None], [{"text": 7}], [{"t": "一"}], {"text": 7}]
)
def test_answers_that_are_none(answers):
    with pytest.raises(InputError, match="^f.json:1: the field 'answer' is"):
        parse({"context": CONTEXT, "question": "问？", "title": "题", "answers": answers})


def test_null_is_as_if_it_were_not_there():
    row = {"id": None, "context": None, "source": "c", "title": "a", "question": None, "target": "q"}
    (record,) = parse({**row, "question_id": "7"})
    assert record == {"id": "7", "context": "c", "answer": "a", "question": "q", "where": "f.json:1"}
    assert parse(row)[0]["id"] == 0
    inner = {"context": None, "question": "q", "answer": "a"}
    assert parse({"context": "outer", "qas": [inner]})[0]["context"] == "outer"
    # An article's title is no answer.
    with pytest.raises(InputError, match="f.json:1: the field 'answer' is null"):
        parse({"context": "c", "answer": None, "title": "article", "question": "q"})


def test_a_blank_question_is_none_where_none_is_needed():
    for question in ("", " \n", None):
        row = {"context": "c", "answer": "a", "question": question}
        assert parse(row, require_question=False)[0]["question"] is None
        with pytest.raises(InputError, match="the field 'question' is"):
            parse(row)


def test_halves_of_a_surrogate_pair_are_replaced():
    row = {"id": "\ud83d", "context": "c\ud83d", "answer": "a", "question": "q"}
    (record,) = parse_lines([json.dumps(row).encode()], "f", True)
    assert (record["id"], record["context"]) == ("?", "c?")


@pytest.mark.parametrize(
    "text, kept",
    [
        ("1.5", 1.5),
        ("true", True),
        ('["a", {"b": [1e-3, null]}]', ["a", {"b": [0.001, None]}]),
        ('{"\\ud83d": "\\ude00", "n": [NaN, 1e999]}', {"?": "?", "n": [None, None]}),
        ("NaN", 0),
        ("[]", []),
        ("[" * 15 + "]" * 15, functools.reduce(lambda inner, _: [inner], range(14), [])),
    ],
)
def test_an_id_is_any_json(text, kept):
    """Nothing is done with it but to write it again."""
    line = f'{{"id": {text}, "context": "c", "answer": "a", "question": "q"}}'
    (record,) = parse_lines([line.encode()], "f", True)
    assert record["id"] == kept and type(record["id"]) is type(kept)
    with pytest.raises(InputError, match="f:1: 'id' is nested too deeply"):
        parse_lines([line.replace(text, "[" * 16 + "]" * 16).encode()], "f", True)


def test_a_mistake_does_not_end_what_follows():
    lines = [b'{"context": "c", "answer": "a"}', b" ", b"{", b"\xff", b"[" * 100_000, b'{"answer": NaN}']
    lines.append(b'{"context": "c", "qas": [{"answer": "b"}, 7, {"answer": "d"}]}')
    found = list(parse_each_line(lines, "f", False))
    errors = [str(item).split(": ")[:2] for item in found if isinstance(item, InputError)]
    assert [where for where, _ in errors] == ["f:2", "f:3", "f:4", "f:5", "f:6", "f:7 qas[1]"]
    answered = [(item["id"], item["answer"]) for item in found if isinstance(item, dict)]
    assert answered == [(0, "a"), (2, "b"), (4, "d")]


def test_what_a_file_of_records_may_be(tmp_path):
    """A pipe, which can't be read twice; not a device, a pipe that nobody writes to, or one in a folder."""
    text = json.dumps(NESTED, ensure_ascii=False, indent=1).encode()
    reader, writer = os.pipe()
    threading.Thread(target=lambda: (os.write(writer, text), os.close(writer))).start()
    assert len(read_records(f"/dev/fd/{reader}", "test")) == 2
    os.close(reader)
    os.mkfifo(tmp_path / "dev.json")
    with pytest.raises(InputError, match="dev.json has no records"):
        read_records(str(tmp_path / "dev.json"), "test")
    for device in ("/dev/zero", "/dev/ptmx"):
        with pytest.raises(InputError, match=f"{device}: it is a device"):
            read_records(device, "test")
    for device in ("/dev/zero", "/dev/ptmx", tmp_path / "dev.json", tmp_path):
        (tmp_path / "train.json").unlink(missing_ok=True)
        (tmp_path / "train.json").symlink_to(device)
        with pytest.raises(InputError, match="train.json, which --do_train reads: it is no regular file"):
            read_records(str(tmp_path), "train")


@pytest.mark.parametrize("split, message", [("dev", "is neither a folder"), ("test", "File name too long")])
def test_a_name_that_no_file_can_have(split, message):
    with pytest.raises(InputError, match=message):
        read_records("x" * 5000, split)


def test_a_file_that_is_missing_says_what_wants_it(tmp_path):
    with pytest.raises(InputError) as error:
        read_records(str(tmp_path), "dev")
    assert "--evaluation_strategy" in str(error.value) and "No such file" in str(error.value)


def test_a_line_without_end(monkeypatch):
    monkeypatch.setattr(records, "LONGEST_LINE", 10)
    assert list(read_lines(io.BytesIO(b"12345678\n\n1"), "f")) == [b"12345678\n", b"\n", b"1"]
    with pytest.raises(InputError, match="f: a line of more than"):
        list(read_lines(io.BytesIO(b"1234567890\n"), "f"))


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


@pytest.mark.parametrize(
    "empty", [{"data": []}, {"qas": [], "context": "x"}, {"data": [{"paragraphs": []}, {"paragraphs": []}]}]
)
def test_a_document_without_a_question(tmp_path, empty):
    """A pipe says so, for each line has its answer; in a file it is as a blank line."""
    record = {"context": "c", "answer": "a", "question": "q"}
    lines = [json.dumps(row).encode() for row in (record, empty, record)]
    first, wrong, last = parse_each_line(lines, "pipe")
    assert (first["id"], last["id"]) == (0, 1)
    assert isinstance(wrong, BlankLine) and str(wrong) == "pipe:2: it holds no question"
    (tmp_path / "dev.json").write_bytes(b"\n".join(lines))
    assert [record["id"] for record in read_records(str(tmp_path), "dev")] == [0, 1]


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
