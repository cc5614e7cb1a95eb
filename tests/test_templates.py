"""Templates: what is one, whose they are, what of a passage is cut, and a second task from end to end."""

import json
import re
import shutil
import unicodedata

import pytest
from helpers import FAST, ROOT, TINY_GLM, flags, losses, pipe, pretrained_in, read_jsonl, run
from paddlenlp.transformers import GLMTokenizer

from data import build_dataset, decode_target, encode_source, encode_target
from glm import templates
from glm.arguments import DataArguments
from glm.errors import InputError
from glm.records import parse_lines, read_records
from glm.templates import DEFAULT_TEMPLATES, Templates, choose_templates, get_templates, parse_template

TITLES = ROOT / "tests/fixtures/titles"
SOURCE, TARGET = "source_template", "target_template"


def make(source, target):
    return Templates(parse_template(SOURCE, source), parse_template(TARGET, target))


@pytest.fixture
def fresh(tmp_path):
    """A function that returns a tokenizer with such templates."""

    def tokenizer_with(source, target):
        tokenizer = GLMTokenizer.from_pretrained(str(TINY_GLM))
        choose_templates(tokenizer, DataArguments(source_template=source, target_template=target))
        return tokenizer

    return tokenizer_with


@pytest.mark.parametrize(
    "text, parts",
    [
        ("{a}", ("", "a", "")),
        ("标题：{标题}。", ("标题：", "标题", "。")),
        ("{a}{b} {a}", ("", "a", "", "b", " ", "a", "")),
        ("{a.__class__}{0}{a[0]}{a!r:>9}", ("", "a.__class__", "", "0", "", "a[0]", "", "a!r:>9", "")),
    ],
)
def test_a_template_is_texts_and_names_of_fields(text, parts):
    """A name is a name: nothing of str.format is carried out."""
    assert parse_template(SOURCE, text).parts == parts


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "has no field"),
        ("text", "has no field"),
        ("{}", "a field without a name"),
        ("{ }{a}", "a field without a name"),
        ("{a", "a { without"),
        ("{a} }", "a } without"),
        ("{{a}}", "a { without"),
        ("{a{b}}", "a { without"),
        ("{id}", "{id}, a name that"),
        ("{score}{a}", "{score}, a name that"),
        ("\ud83d{a}", "surrogates not allowed"),
        ("长" * 10_001 + "{a}", "more than 10,000 characters"),
    ],
)
def test_what_is_no_template_is_refused(text, message, tmp_path):
    """By the flag, and in a model's file, in one line."""
    tokenizer = GLMTokenizer.from_pretrained(str(TINY_GLM))
    with pytest.raises(InputError, match=f"^--source_template can't be used .*{re.escape(message)}"):
        choose_templates(tokenizer, DataArguments(source_template=text))
    folder = shutil.copytree(TINY_GLM, tmp_path / "model")
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    path.write_text(json.dumps({**values, SOURCE: text}))
    with pytest.raises(InputError, match=f"^--model_name_or_path .*({re.escape(message)}|no text in UTF-8)"):
        pretrained_in(folder)
    path.write_text(json.dumps({**values, TARGET: 7}))
    with pytest.raises(InputError, match="'target_template' is a int"):
        pretrained_in(folder)
    path.write_text(json.dumps({**values, TARGET: None}))
    assert get_templates(pretrained_in(folder).tokenizer) == DEFAULT_TEMPLATES


def test_the_flags_win_then_the_checkpoint_then_the_model(monkeypatch, tmp_path):
    told = []
    monkeypatch.setattr(templates.logger, "warning", told.append)
    tokenizer = GLMTokenizer.from_pretrained(str(TINY_GLM))
    default = {SOURCE: "答案：{answer}，上下文：{context}", TARGET: "在已知答案的前提下，问题：{question}"}
    chosen = choose_templates(tokenizer, DataArguments())
    assert {name: getattr(chosen, name) for name in default} == default
    tokenizer.init_kwargs.update({SOURCE: "{m}", TARGET: "{n}"})
    chosen = choose_templates(tokenizer, DataArguments(source_template="{m}"))
    assert (chosen.source_template, chosen.target_template, told) == ("{m}", "{n}", [])
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({SOURCE: "{c}"}))
    chosen = choose_templates(tokenizer, DataArguments(target_template="标题：{t}"), tmp_path)
    assert (chosen.source_template, chosen.target_template, told) == ("{c}", "标题：{t}", [])
    assert get_templates(tokenizer) == make("{c}", "标题：{t}")
    choose_templates(tokenizer, DataArguments(source_template="{f}"), tmp_path)
    choose_templates(tokenizer, DataArguments(source_template="{g}"))
    assert [line.split("that of ")[1] for line in told] == [
        f"{tmp_path}/tokenizer_config.json, '{{c}}'",
        "the model, '{f}'",
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({SOURCE: "{"}))
    with pytest.raises(InputError, match="tokenizer_config.json can't be read"):
        choose_templates(tokenizer, DataArguments(), tmp_path)


def parse(row, source, target, require_target=True):
    lines = [b"", json.dumps(row, ensure_ascii=False).encode()]
    return parse_lines(lines, "f.json", require_target, make(source, target))


def test_a_record_has_the_fields_of_the_templates():
    row = {"b": "二", "id": 5, "c": "三", "a": "一", "answer": [], "qas": [1]}
    (record,) = parse(row, "{b}{a}", "题：{c}，{a}")
    assert record == {"id": 5, "where": "f.json:2", "a": "一", "b": "二", "c": "三"}
    assert list(record) == ["id", "where", "b", "a", "c"]
    assert make("{b}{a}", "题：{c}，{a}").get_reference(record) == "三，一"
    del row["c"]
    (record,) = parse(row, "{b}{a}", "题：{c}，{a}", require_target=False)
    assert record["c"] is None and make("{b}{a}", "题：{c}，{a}").get_reference(record) is None
    for row, message in [
        ({"a": "一", "c": "三"}, "the field 'b' is missing: a record needs b, a and c"),
        ({"a": 7, "b": "", "c": "三"}, "the field 'a' is a int: it must be a string"),
        ({"a": None, "b": "", "c": "三"}, "the field 'a' is null: a record needs b, a and c"),
        ({"a": "一", "b": " ", "c": " "}, "the field 'c' is empty"),
        ({"a": "一", "b": "二", "c": ["三"]}, "the field 'c' is a list"),
    ]:
        with pytest.raises(InputError, match=f"^f.json:2: {message}"):
            parse(row, "{b}{a}", "题：{c}，{a}")


def test_other_names_are_question_generations_own():
    row = {"source": "文", "title": "答", "target": "问"}
    assert parse(row, "{context}{answer}", "{question}")[0]["answer"] == "答"
    with pytest.raises(InputError, match="f.json:2: the field 'context' is missing"):
        parse(row, "{context}{title}", "{question}")
    # Question answering, of reading comprehension as it is published.
    squad = {
        "context": "文",
        "qas": [{"question": "问", "answers": [{"text": "答"}]}, {"question": "二", "answers": []}],
    }
    (record,) = parse(squad, "{question}{context}", "{answer}")
    assert (record["question"], record["answer"]) == ("问", "答")
    records = parse(squad, "{question}{context}", "{answer}", require_target=False)
    assert [record["answer"] for record in records] == ["答", None]
    assert "context" not in parse(squad, "{question}", "{answer}")[0]


def test_the_last_field_alone_is_cut(fresh):
    """Texts and fields around it stay, and its beginning."""
    tokenizer = fresh("{a}，上下文：{b}{c}。问题：", "{a}")
    record = {"a": "海月山", "b": "高", "c": "白云山海拔1200米。" * 20, "where": "f:3"}
    ids, lost = encode_source(tokenizer, record, 10**6)
    cut, lost_of_cut = encode_source(tokenizer, record, 60)
    assert lost == [] and lost_of_cut == ["passages are cut at --src_length 60"] and len(cut) == 60
    end = len(ids) - next(n for n in range(1, len(ids)) if cut[-n] != ids[-n]) + 1
    begin = next(n for n in range(len(ids)) if cut[n] != ids[n])

    def text(ids):
        return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids))

    kept = text(cut[1:-2])
    assert kept.startswith("海月山,上下文:高白云山海拔1200米。白云山") and kept.endswith("。问题:")
    assert begin + len(ids) - end == 60 and text(ids[end:-2]).endswith("。问题:")
    for longer in ({**record, "a": "海月山" * 30}, {**record, "b": "高" * 60}):
        with pytest.raises(InputError, match="^f:3: prompt and a and b take .* or shorten the a or shorten"):
            encode_source(tokenizer, longer, 60)
    with pytest.raises(InputError, match="^f:3: prompt takes .* 60: raise it$"):
        encode_source(fresh("问题：" * 40 + "{c}", "{a}"), record, 60)
    assert build_dataset(tokenizer, [{**record, "b": ""}], 60, 32)[0]["source_length"] == 60


def test_the_window_is_around_the_answers_first_occurrence(fresh):
    tokenizer = fresh(None, None)
    parts = [f"{number}年山海拔{number}米。" for number in range(1000, 1040)]
    record = {"context": "".join(parts), "where": "f:1"}

    def kept(answer, src_length=100):
        ids, lost = encode_source(tokenizer, {**record, "answer": answer}, src_length, "answer")
        assert len(ids) <= src_length and not any("lose" in loss for loss in lost)
        text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[1:-2]))
        return text.split("上下文:")[1].replace(" ", "")

    beginning = encode_source(tokenizer, {**record, "answer": "1001米"}, 100)[0]
    assert encode_source(tokenizer, {**record, "answer": "1001米"}, 100, "answer")[0] == beginning
    assert kept("1001米").startswith("1000年山")  # it fits from the beginning
    middle = kept("1020米")
    before, after = middle.split("1020米")
    assert len(before) > 20 and len(after) > 20 and abs(len(before) - len(after)) < 15
    assert middle in "".join(parts)  # nothing of the beginning, which shares a piece with the prompt
    assert kept("1039米").endswith("1039米。")  # the window is full
    assert len(kept("1039米")) > len(middle) - 15
    assert kept("米").startswith("1000年山") and kept("九").startswith("1000年山")  # not in the passage
    assert kept("1039米", 2000) == "".join(parts)


def test_an_answer_longer_than_the_room_keeps_its_beginning(fresh):
    tokenizer = fresh(None, None)
    answer = "山海拔1200米。" * 8
    record = {"context": "白云" * 60 + answer, "answer": answer, "where": "f:1"}
    needed = len(encode_source(tokenizer, {**record, "context": ""}, 10**6)[0])
    ids, lost = encode_source(tokenizer, record, needed + 10, "answer")
    assert len(ids) == needed + 10 and "passages lose their answer" in " ".join(lost)
    text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[1:-2]))
    assert "山海拔" in text.split("上下文:")[1]


def test_an_answer_that_fills_the_room_is_kept_complete(fresh):
    tokenizer = fresh(None, None)
    answer = "1205米"
    record = {"context": "白云。" * 60 + answer + "。白云" * 60, "answer": answer, "where": "f:1"}
    needed = len(encode_source(tokenizer, {**record, "context": ""}, 10**6)[0])
    rooms = [
        room for room in range(1, 9) if "lose" not in " ".join(window(tokenizer, record, needed + room)[1])
    ]
    kept, _ = window(tokenizer, record, needed + rooms[0])
    assert rooms == list(range(rooms[0], 9)) and kept == answer


def window(tokenizer, record, src_length):
    """The part of the passage that is kept, and what is lost."""
    ids, lost = encode_source(tokenizer, record, src_length, "answer")
    text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids[1:-2]))
    return text.split("上下文:")[1].replace(" ", ""), lost


@pytest.mark.parametrize("source", ["{context}", "{context}{answer}", "{question}{context}"])
def test_a_window_wants_an_answer(source):
    tokenizer = GLMTokenizer.from_pretrained(str(TINY_GLM))
    with pytest.raises(InputError, match="--truncation answer keeps .* no {answer} before that"):
        choose_templates(tokenizer, DataArguments(source_template=source, truncation="answer"))
    choose_templates(tokenizer, DataArguments(source_template=source))


@pytest.mark.parametrize("src_length, lost", [(128, 107), (256, 31)])
def test_no_passage_of_dureader_qg_loses_its_answer_by_a_window(real_tokenizer, src_length, lost):
    path = ROOT.parent / "shared/data/DuReaderQG/dev.json"
    if not path.is_file():
        pytest.skip("DuReaderQG/dev.json is not here")
    counts = {"end": 0, "answer": 0}

    def plain(text):
        return re.sub(r"[\s\u2581]", "", unicodedata.normalize("NFKC", text))

    for record in read_records(str(path), "test"):
        answer = plain(record["answer"])
        for truncation in counts:
            ids, _ = encode_source(real_tokenizer, record, src_length, truncation)
            assert len(ids) <= src_length
            tokens = real_tokenizer.convert_ids_to_tokens(ids[1:-2])
            passage = plain("".join(tokens)).split("上下文:", 1)[1]
            # A character that the tokenizer does not know has no text in its tokens.
            known = real_tokenizer.unk_token_id not in ids
            missing = known and answer in plain(record["context"]) and answer not in passage
            counts[truncation] += missing
    assert counts["answer"] == 0 and 0.5 * lost < counts["end"] <= lost


def test_the_opening_is_taken_off_as_the_tokenizer_writes_it(fresh):
    """Also where it holds a character that the tokenizer does not know; and there may be none."""
    for target, text in (("标题：{title}", "山高1205米"), ("{title}。", "山高1205米。"), ("龘{title}", "山")):
        tokenizer = fresh("{text}", target)
        reference = get_templates(tokenizer).get_reference({"title": "山高1205米" if len(text) > 1 else "山"})
        labels, _ = encode_target(tokenizer, reference, 32)
        assert decode_target(tokenizer, labels) == text


GENERATION = [
    *FAST,
    *flags(src_length=64, num_beams=2, no_repeat_ngram_size=0, learning_rate=2e-3),
    *flags(per_device_train_batch_size=8, logging_steps=1),
]
TRAIN = [*GENERATION, "--do_train", *flags(task_name=TITLES)]


@pytest.fixture(scope="module")
def titles(tmp_path_factory):
    """A folder with a model that has learned the titles of tests/fixtures/titles by heart."""
    folder = tmp_path_factory.mktemp("titles")
    templates = flags(source_template="{text}", target_template="标题：{title}")
    model = flags(model_name_or_path=TINY_GLM, output_dir=folder / "model", max_steps=60)
    run(*TRAIN, *model, *templates, "--do_eval")
    return folder


def predict(model, out):
    run(*GENERATION, *flags(model_name_or_path=model, output_dir=out, predict_file=TITLES / "train.json"))
    return read_jsonl(out / "test_predictions.jsonl")


def test_a_second_task_is_trained_and_predicted_from_its_folder(titles, tmp_path):
    rows, records = predict(titles / "model", tmp_path / "out"), read_jsonl(TITLES / "train.json")
    assert [list(row)[:4] for row in rows] == [["id", "text", "reference", "prediction"]] * 8
    assert [(row["text"], row["reference"]) for row in rows] == [(r["text"], r["title"]) for r in records]
    assert sum(row["prediction"] == row["reference"] for row in rows) >= 7
    answers = pipe(TITLES / "train.json", *GENERATION, "--model_name_or_path", titles / "model")
    assert [list(row) for row in answers] == [list(row) for row in rows]
    assert [(row["text"], row["token_ids"]) for row in answers] == [(r["text"], r["token_ids"]) for r in rows]
    run(
        *GENERATION,
        *flags(model_name_or_path=titles / "model", output_dir=tmp_path / "eval", task_name=TITLES),
        "--do_eval",
    )
    assert read_jsonl(tmp_path / "eval/eval_predictions.jsonl") == read_jsonl(
        titles / "model/eval_predictions.jsonl"
    )
    arguments = json.loads((titles / "model/arguments.json").read_text())["DataArguments"]
    assert (arguments[SOURCE], arguments[TARGET]) == ("{text}", "标题：{title}")


def test_a_second_task_in_adapters_merged_exported_and_in_peers(titles, tmp_path):
    """Wherever the model is written, its templates lie beside it; PaddleNLP reads the folders."""
    model = flags(model_name_or_path=titles / "model", output_dir=tmp_path / "out", max_steps=1, lora=True)
    run(*TRAIN, *model, *flags(save_steps=1, merge_lora=True, export_torch=True))
    for folder in ("out", "out/checkpoint-1", "out/torch"):
        tokenizer = GLMTokenizer.from_pretrained(str(tmp_path / folder))
        assert get_templates(tokenizer) == make("{text}", "标题：{title}")
    merged = predict(tmp_path / "out", tmp_path / "merged")
    adapter = predict(tmp_path / "out/checkpoint-1", tmp_path / "adapter")
    assert [row["token_ids"] for row in merged] == [row["token_ids"] for row in adapter]
    assert sum(row["prediction"] == row["reference"] for row in adapter) >= 6


def test_going_on_takes_the_checkpoints_templates(titles, tmp_path):
    """Without the flags the losses are those of a run never stopped; one that differs is told."""
    model = flags(model_name_or_path=TINY_GLM, save_steps=2, max_steps=4)
    templates = flags(source_template="{text}", target_template="标题：{title}")
    run(*TRAIN, *model, *templates, *flags(output_dir=tmp_path / "out"))
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    expected = losses(tmp_path / "out")
    lines = run(*TRAIN, *model, *flags(output_dir=tmp_path / "out"))
    assert losses(tmp_path / "out") == expected and not any("differs" in line for line in lines)
    shutil.rmtree(tmp_path / "out/checkpoint-4")
    lines = run(*TRAIN, *model, *flags(output_dir=tmp_path / "out", target_template="题：{title}"))
    assert any("--target_template takes the place of that of" in line for line in lines)
    assert any(
        "differs from" in line and "target_template 标题：{title} -> 题：{title}" in line for line in lines
    )
    assert losses(tmp_path / "out")[4] != expected[4]


def test_a_field_that_records_lack_is_a_line(tmp_path):
    out = flags(model_name_or_path=TINY_GLM, output_dir=tmp_path / "out")
    lines = run(*TRAIN, *out, *flags(source_template="{text}", target_template="{headline}"), code=2)
    place = f"{TITLES}/train.json:1: the field 'headline' is missing: a record needs text and headline"
    assert lines[-1] == f"finetune_generation.py: error: {place}" and not (tmp_path / "out").exists()
