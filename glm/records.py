"""Records as people have them: JSON lines, reading comprehension in SQuAD's form, a pipe."""

import itertools
import os
import queue
import threading

from paddlenlp.utils.log import logger

from glm.errors import InputError, as_input_error
from glm.files import dump_json, is_too_deep, open_input, open_regular, parse_json
from glm.templates import DEFAULT_TEMPLATES

# Those that paddlenlp.datasets has on both stacks, and their splits.
DATASETS = {
    "dureader_qg": ("train", "dev"),
    "cmrc2018": ("train", "dev"),
    "drcd": ("train", "dev", "test"),
    "dureader_robust": ("train", "dev", "test"),
}
# The lists that a nested file holds its questions in, from the outermost.
LEVELS = ("data", "paragraphs", "qas")
LONGEST_LINE = 1 << 28  # bytes
READ_BY = {
    "train": "--do_train reads",
    "dev": "--do_eval and --evaluation_strategy read",
    "test": "--do_predict reads",
}


class BlankLine(InputError):
    """A line without a record, such as a blank one. It is a mistake in a pipe alone."""


class Unanswered(InputError):
    """A question that is said to have no answer. It is left out of a file, and a mistake in a pipe."""

    def __init__(self, where):
        super().__init__(f"{where}: the question has no answer: give one")
        self.where = where


def read_records(task_name, split, require_target=True, templates=DEFAULT_TEMPLATES):
    """Read one split.

    Args:
        task_name (str): one of DATASETS, a folder that holds ``{split}.json``, or a file.
        split (str): ``train``, ``dev`` or ``test``.
        require_target (bool): whether a record without the fields of the target is a mistake.
        templates (Templates): which fields there are.

    Returns:
        list of dicts: see ``parse_record``. Questions that have no answer are left out.

    Raises:
        InputError: also for a file that is missing or has no records.
    """
    in_folder = os.path.isdir(task_name)
    if task_name in DATASETS and not in_folder:
        name = f"the {split} split of {task_name}"
        rows = enumerate(load_published(task_name, split))
        records = take_records(
            parse_record(row, f"{name}, record {number}", number, require_target, templates)
            for number, row in rows
        )
    else:
        if not in_folder and split != "test":
            raise InputError(
                f"--task_name {task_name} is neither a folder nor one of {', '.join(DATASETS)}: give one"
            )
        name = os.path.join(task_name, f"{split}.json") if in_folder else task_name
        try:
            with open_regular(name) if in_folder else open_input(name) as file:
                lines = join_document(read_lines(file, name))
                records = parse_lines(lines, name, require_target, templates)
        except InputError:
            raise
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            needed = f", which {READ_BY[split]}" if in_folder else ""
            raise InputError(f"{name}{needed}: {reason}: give a file that can be read") from error
    if not records:
        raise InputError(f"{name} has no records: at least one is needed")
    return records


def load_published(name, split):
    """Download a split of one of DATASETS. Returns its rows, dicts."""
    from paddlenlp.datasets import load_dataset  # takes a second, which folders need not wait

    if split not in DATASETS[name]:
        raise InputError(f"{name} has no {split} split: give --task_name a folder with {split}.json")
    advice = "check the connection, or give --task_name a folder with train.json and dev.json"
    with as_input_error(f"{name} could not be downloaded", advice):
        return load_dataset(name, splits=split)


def take_records(results):
    """Return the records, list, among ``results``, and count the questions without an answer in a line.

    Args:
        results: iterable of records and InputErrors, as ``parse_each_line`` gives them.

    Raises:
        InputError: the first that is a mistake in a file.
    """
    records, unanswered = [], []
    for result in results:
        if isinstance(result, Unanswered):
            unanswered.append(result.where)
        elif not isinstance(result, InputError):
            records.append(result)
        elif not isinstance(result, BlankLine):
            raise result
    if unanswered:
        logger.warning(
            f"{len(unanswered)} of {len(unanswered) + len(records)} questions have no answer and are left "
            f"out, the first at {unanswered[0]}"
        )
    return records


def read_lines(file, name):
    """Yield the lines of a binary file. Raises InputError for one that is too long to be a record."""
    while True:
        line = file.readline(LONGEST_LINE)
        if not line:
            return
        if len(line) == LONGEST_LINE:
            raise InputError(f"{name}: a line of more than {LONGEST_LINE >> 20} MiB: give one record a line")
        yield line


def join_document(lines):
    """Join the ``lines`` of a file that is one JSON object over several, as printed for people to read."""
    lines, head = iter(lines), []
    for line in lines:
        head.append(line)
        if line.strip():
            break
    if head and head[-1].rstrip().endswith((b"{", b"[", b",", b":")):
        return [b"".join([*head, *lines])]
    return itertools.chain(head, lines)


def parse_lines(lines, name, require_target=True, templates=DEFAULT_TEMPLATES):
    """Parse JSON lines, as ``parse_each_line`` does. Returns the records, list of dicts.

    Raises:
        InputError: with file and line, for a line that is not UTF-8 or not a JSON object, or a field that
            is missing, empty or of another type.
    """
    return take_records(parse_each_line(lines, name, require_target, templates))


def parse_each_line(lines, name, require_target=True, templates=DEFAULT_TEMPLATES):
    """Parse JSON ``lines``, bytes, of what messages call ``name``, and go on behind a mistake.

    Yields:
        dict or InputError: for each line its record (or those of its questions), or what is wrong with
        it; that may be that it is blank, holds no question, or has no answer.
    """
    count = 0
    for number, line in enumerate(lines, start=1):
        # The message on a document over several lines says itself in which it is wrong.
        where = name if b"\n" in line.strip() else f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = parse_json(text) if text else None
        except UnicodeDecodeError as error:
            yield InputError(f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8")
            continue
        except ValueError as error:
            yield InputError(f"{where}: {describe_json_error(error)}")
            continue
        if not text:
            yield BlankLine(f"{where}: the line is blank")
            continue
        count_before = count
        for question, place in flatten(row, where) if templates.ask else [(row, where)]:
            yield parse_record(question, place, count, require_target, templates)
            count += 1
        if count == count_before:
            yield BlankLine(f"{where}: it holds no question")


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
    if isinstance(row, dict) and all(row.get(name) is None for name in ("question", "answer", "answers")):
        for depth, level in enumerate(levels, start=1):
            if isinstance(row.get(level), list):
                place = f"{where}.{level}" if where.endswith("]") else f"{where} {level}"
                for number, inner in enumerate(row[level]):
                    if isinstance(inner, dict) and "context" in row and inner.get("context") is None:
                        inner = {**inner, "context": row["context"]}
                    yield from flatten(inner, f"{place}[{number}]", levels[depth:])
                return
    yield row, where


def parse_record(row, where, number, require_target=True, templates=DEFAULT_TEMPLATES):
    """Take the fields that the templates name; question generation's in any published form.

    A field that is null counts as missing. But ``title`` takes the place of an answer that is null only
    beside ``source``: beside ``context`` it may be an article's.

    Args:
        row: what JSON holds.
        where (str): file and line.
        number (int): of the record, from 0.
        require_target, templates: as ``read_records`` has them.

    Returns:
        dict: ``id`` (any JSON, as given, else ``number``), ``where``, and the fields, of which those of
        the target are None where they are missing and may be; or an InputError that says what is wrong.
    """
    if not isinstance(row, dict):
        return InputError(f"{where}: a {type(row).__name__}: each line must be one JSON object")
    fields = {name: value for name, value in row.items() if value is not None}
    identifier = fields.get("id", fields.get("question_id", number))
    if is_too_deep([identifier]):
        return InputError(f"{where}: 'id' is nested too deeply: give a shorter one")
    # Nothing is done with it but to write it again, and JSON has no NaN.
    identifier = parse_json(replace_surrogates(dump_json(identifier, ensure_ascii=False)))
    if templates.ask:
        fields["context"] = fields.get("context", fields.get("source"))
        fields["answer"] = find_answer(row)
        fields["question"] = fields.get("question", fields.get("target"))
    record = {"id": number if identifier is None else identifier, "where": where}
    for name in templates.fields:
        value, needed = fields.get(name), require_target or name in templates.source.fields
        blank = value is None or isinstance(value, str) and not value.strip()
        unanswered = templates.ask and name == "answer" and value == []
        if not needed and (blank or unanswered):
            record[name] = None
        elif unanswered:
            return Unanswered(where)
        elif value is None:
            lack = "null" if name in row else "missing"
            *names, last = templates.fields
            listed = f"{', '.join(names)} and {last}" if names else last
            return InputError(f"{where}: the field '{name}' is {lack}: a record needs {listed}")
        elif not isinstance(value, str):
            kind = type(value).__name__
            return InputError(f"{where}: the field '{name}' is a {kind}: it must be a string")
        elif blank and require_target and name in templates.target.fields:
            return InputError(f"{where}: the field '{name}' is empty: it is what the model learns to write")
        else:
            record[name] = replace_surrogates(value)
    return record


def replace_surrogates(text):
    """Replace halves of a surrogate pair, which JSON may hold, but no tokenizer and no file."""
    return text.encode("utf-8", "replace").decode("utf-8")


def find_answer(row):
    """Find the answer of a question: ``answer``, the first of ``answers``, or else ``title``.

    ``answers`` is what SQuAD and DuReader have: a list of texts or of {"text": text}, or
    {"text": [text, text]}.

    Returns:
        the answer, which is a str in a right file; [] where the question has no answer.
    """
    if row.get("answer") is not None:
        return row["answer"]
    if "answers" not in row:
        return row.get("title") if "answer" not in row or row.get("source") is not None else None
    if row.get("is_impossible") is True:  # SQuAD 2, where ``answers`` may be plausible ones
        return []
    answers = row["answers"]
    if isinstance(answers, dict):
        answers = answers.get("text")
    if isinstance(answers, list) and answers:
        answers = answers[0]
    return answers.get("text") if isinstance(answers, dict) else answers


def read_in_batches(items, batch_size):
    """Yield lists of 1 to ``batch_size`` of those ``items`` that are there already.

    Only the first of a list is waited for. An exception that ends ``items`` is raised after all that
    came before it.
    """
    ready, end = queue.Queue(maxsize=batch_size), object()

    def read():
        error = None
        try:
            for item in items:
                ready.put((item, None))
        except BaseException as raised:
            error = raised
        ready.put((end, error))

    threading.Thread(target=read, daemon=True).start()
    batch = []
    while True:
        item, error = ready.get()
        if item is not end:
            batch.append(item)
        if batch and (item is end or len(batch) == batch_size or ready.empty()):
            yield batch
            batch = []
        if error is not None:
            raise error
        if item is end:
            return
