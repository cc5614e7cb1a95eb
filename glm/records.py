"""Records as people have them: JSON lines, reading comprehension in SQuAD's form, a pipe."""

import json
import queue
import threading
from pathlib import Path

from paddlenlp.utils.log import logger

from glm.errors import InputError, as_input_error

# The lists that a nested file holds its questions in, from the outermost.
LEVELS = ("data", "paragraphs", "qas")


def read_records(task_name, split, require_question=True):
    """Read one split.

    Args:
        task_name (str): ``dureader_qg``, a folder that holds ``{split}.json``, or a file.
        split (str): ``train``, ``dev`` or ``test``.
        require_question (bool): whether a record without a question is a mistake.

    Returns:
        list of dicts: see ``parse_lines``. Questions that have no answer are left out.

    Raises:
        InputError: also for a file that is missing or has no records.
    """
    source = Path(task_name)
    if task_name == "dureader_qg" and not source.is_dir():
        name = f"the {split} split of dureader_qg"
        records = [
            parse_record(row, f"{name}, record {number}", number, require_question)
            for number, row in enumerate(load_dureader_qg(split))
        ]
    else:
        if not source.is_dir() and split != "test":
            raise InputError(
                f"--task_name {task_name} is neither dureader_qg nor a folder: give one of the two"
            )
        name = str(source / f"{split}.json" if source.is_dir() else source)
        try:
            with open(name, "rb") as file:
                lines = [file.read()] if spans_lines(file) else file
                records = list(parse_lines(lines, name, require_question))
        except OSError as error:
            message = f"{name}: {error.strerror}: give a file that can be read"
            raise InputError(message) from error
    unanswered = [record["where"] for record in records if record["answer"] is None]
    if unanswered:
        logger.warning(
            f"{len(unanswered)} of {len(records)} questions have no answer and are left out, "
            f"the first at {unanswered[0]}"
        )
        records = [record for record in records if record["answer"] is not None]
    if not records:
        raise InputError(f"{name} has no records: at least one is needed")
    return records


def load_dureader_qg(split):
    """Download a split of DuReaderQG. Returns its rows, dicts with source, title and target."""
    from paddlenlp.datasets import load_dataset  # takes a second, which folders need not wait

    if split not in ("train", "dev"):
        raise InputError(f"dureader_qg has no {split} split: give --task_name a folder with {split}.json")
    advice = "check the connection, or give --task_name a folder with train.json and dev.json"
    with as_input_error("dureader_qg could not be downloaded", advice):
        return load_dataset("dureader_qg", splits=split)


def spans_lines(file):
    """Whether a file is one JSON object over several lines, as printed for people to read."""
    first = next((line for line in file if line.strip()), b"").rstrip()
    file.seek(0)
    return first.endswith((b"{", b"[", b",", b":"))


def parse_lines(lines, name, require_question):
    """Parse JSON lines one at a time; blank lines are left out.

    Args:
        lines: iterable of bytes, such as a file. name (str): what messages call it.
        require_question (bool): whether a record without a question is a mistake.

    Yields:
        dict: see ``parse_record``.

    Raises:
        InputError: with file and line, for a line that is not UTF-8 or not a JSON object, or a
            field that is missing, empty or of another type.
    """
    count = 0
    for number, line in enumerate(lines, start=1):
        # A document over several lines says more exactly itself where it is wrong.
        where = name if b"\n" in line.strip() else f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            message = f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8"
            raise InputError(message) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: {describe_json_error(error)}") from error
        if text:
            for question, place in flatten(row, where):
                yield parse_record(question, place, count, require_question)
                count += 1


def describe_json_error(error):
    """Returns what is wrong with a line, str; a character that can't be seen is named."""
    character = error.doc[error.pos : error.pos + 1] if hasattr(error, "doc") else ""
    if character and not character.isprintable():
        ends = ", DOS's mark of a file's end" if character == "\x1a" else ""
        return f"not JSON: it holds the character U+{ord(character):04X}{ends}: take it out, or escape it"
    return f"not JSON ({error}): each line must be one JSON object"


def flatten(row, where, levels=LEVELS):
    """Yield the questions of a row and their places.

    A row is one question, or holds lists of them: {"data": [{"paragraphs": [{"context": ...,
    "qas": [question, question]}]}]} gives two questions with that context, the second at
    "where data[0].paragraphs[0].qas[1]".
    """
    if isinstance(row, dict) and not {"question", "answer", "answers"} & row.keys():
        for depth, level in enumerate(levels, start=1):
            if isinstance(row.get(level), list):
                place = f"{where}.{level}" if where.endswith("]") else f"{where} {level}"
                for number, inner in enumerate(row[level]):
                    if isinstance(inner, dict) and "context" in row:
                        inner = {"context": row["context"], **inner}
                    yield from flatten(inner, f"{place}[{number}]", levels[depth:])
                return
    yield row, where


def parse_record(row, where, number, require_question):
    """Bring a question of any published form into one.

    Args:
        row: what JSON holds. where (str): file and line. number (int): of the record, from 0.
        require_question (bool): whether a record without a question is a mistake.

    Returns:
        dict: ``id`` (as given, else ``number``), ``context``, ``answer`` (None where the question
        is said to have none), ``question`` (None where there is none) and ``where``.
    """
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise InputError(f"{where}: a {kind}: each line must be one JSON object")
    record = {"id": row.get("id", row.get("question_id", number)), "where": where}
    if not isinstance(record["id"], (str, int)):
        kind = type(record["id"]).__name__
        raise InputError(f"{where}: 'id' is a {kind}: it must be a string or a whole number")
    values = {
        "context": row.get("context", row.get("source")),
        "answer": find_answer(row, where),
        "question": row.get("question", row.get("target")),
    }
    for name, value in values.items():
        if name == "question" and not require_question and value in (None, ""):
            record[name] = None
        elif name == "answer" and value == []:
            record[name] = None
        else:
            check_text(name, value, where)
            # Half of a surrogate pair is legal JSON, but no tokenizer and no file can hold it.
            record[name] = value.encode("utf-8", "replace").decode("utf-8")
    return record


def check_text(name, value, where):
    """Raise InputError unless ``value`` can be the field ``name`` of a record."""
    if value is None:
        raise InputError(
            f"{where}: the field '{name}' is missing: a record needs context, answer and question"
        )
    if not isinstance(value, str):
        kind = type(value).__name__
        raise InputError(f"{where}: the field '{name}' is a {kind}: it must be a string")
    if name == "question" and not value.strip():
        raise InputError(f"{where}: the field 'question' is empty: it is what the model learns to write")


def find_answer(row, where):
    """Find the answer of a question: ``answer``, the first of ``answers``, or else ``title``.

    ``answers`` is what SQuAD and DuReader have: a list of texts or of {"text": text}, or
    {"text": [text, text]}.

    Returns:
        the answer, which is a str in a right file; [] where the question has no answer.
    """
    if row.get("answer") is not None or "answers" not in row:
        return row.get("answer", row.get("title"))
    if row.get("is_impossible") is True:  # SQuAD 2, where ``answers`` may be plausible ones
        return []
    answers = row["answers"]
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list) and answers:
        answers = answers[0]
    return answers.get("text") if isinstance(answers, dict) else answers


def read_in_batches(records, batch_size):
    """Yield lists of 1 to ``batch_size`` of those ``records`` that are there already.

    Only the first of a list is waited for. What ends ``records``, an exception too, comes
    after all that came before it.
    """
    ready = queue.Queue(maxsize=batch_size)

    def read():
        try:
            for record in records:
                ready.put(record)
            ready.put(None)
        except BaseException as error:
            ready.put(error)

    threading.Thread(target=read, daemon=True).start()
    end = False
    while end is False:
        batch, item = [], ready.get()
        while True:
            if item is None or isinstance(item, BaseException):
                end = item
                break
            batch.append(item)
            if len(batch) == batch_size or ready.empty():
                break
            item = ready.get()
        if batch:
            yield batch
    if end is not None:
        raise end
