"""From a record to a padded batch: reading, prompt, 2D positions, collation.

Nothing here needs a model or a device: features and batches are numpy arrays.
"""

import json
import queue
import threading
from pathlib import Path

import numpy as np
from tqdm import tqdm

from glm.errors import InputError, mistakes

SOURCE_OPENING = "答案：{answer}，上下文："
TARGET_OPENING = "在已知答案的前提下，问题："
PAD_MULTIPLE = 8  # matrix units want lengths that are multiples of 8


def read_records(task_name, split, require_question=True):
    """Read one split. Returns a list of records, see ``parse_lines``.

    Args:
        task_name (str): ``dureader_qg``, a folder that holds ``{split}.json``, or a file.
        split (str): ``train``, ``dev`` or ``test``.
        require_question (bool): whether a record without a question is a mistake.

    Raises:
        InputError: also for a file that is missing or empty.
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
                f"--task_name {task_name} is neither dureader_qg nor a folder: give one of the two",
            )
        name = str(source / f"{split}.json" if source.is_dir() else source)
        try:
            with open(name, "rb") as file:
                records = list(parse_lines(file, name, require_question))
        except OSError as error:
            raise InputError(
                f"{name}: {error.strerror}: give a file that can be read",
            ) from error
    if not records:
        raise InputError(f"{name} has no records: at least one is needed")
    return records


def load_dureader_qg(split):
    """Download a split of DuReaderQG. Returns its rows, dicts with source, title and target."""
    from paddlenlp.datasets import (
        load_dataset,
    )  # takes seconds, which readers of folders save

    if split not in ("train", "dev"):
        raise InputError(
            f"dureader_qg has no {split} split: give --task_name a folder with {split}.json",
        )
    advice = "check the connection, or give --task_name a folder with train.json and dev.json"
    with mistakes("dureader_qg could not be downloaded", advice):
        return load_dataset("dureader_qg", splits=split)


def parse_lines(lines, name, require_question):
    """Parse JSON lines one at a time; blank lines are left out.

    Args:
        lines: iterable of bytes, such as a file. name (str): what messages call it.
        require_question (bool): whether a record without a question is a mistake.

    Yields:
        dict: ``id`` (as given, or the record's number from 0), ``context``, ``answer``,
        ``question`` (str, or None where there is none) and ``where`` (file and line).

    Raises:
        InputError: with file and line, for a line that is not UTF-8 or not a JSON object, or a
            field that is missing, empty or of another type.
    """
    count = 0
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8",
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"{where}: not JSON ({error}): each line must be one JSON object",
            ) from error
        if text:
            yield parse_record(row, where, count, require_question)
            count += 1


def parse_record(row, where, number, require_question):
    """Bring a record of either published form into one.

    Args:
        row: what JSON holds. where (str): file and line. number (int): of the record, from 0.
        require_question (bool): whether a record without a question is a mistake.

    Returns:
        dict: see ``parse_lines``.
    """
    if not isinstance(row, dict):
        kind = type(row).__name__
        raise InputError(f"{where}: a {kind}: each line must be one JSON object")
    record = {"id": row.get("id", number), "where": where}
    if not isinstance(record["id"], (str, int)):
        kind = type(record["id"]).__name__
        raise InputError(
            f"{where}: 'id' is a {kind}: it must be a string or a whole number",
        )
    other_names = {"context": "source", "answer": "title", "question": "target"}
    for name, other_name in other_names.items():
        value = row.get(name, row.get(other_name))
        if name == "question" and not require_question and value in (None, ""):
            record[name] = None
            continue
        if value is None:
            raise InputError(
                f"{where}: the field '{name}' is missing: a record needs context, answer and question"
            )
        if not isinstance(value, str):
            kind = type(value).__name__
            raise InputError(
                f"{where}: the field '{name}' is a {kind}: it must be a string",
            )
        if name == "question" and not value.strip():
            raise InputError(
                f"{where}: the field 'question' is empty: it is what the model learns to write",
            )
        # Half of a surrogate pair is legal JSON, but neither the tokenizer nor a file can hold it.
        record[name] = value.encode("utf-8", "replace").decode("utf-8")
    return record


def encode_text(tokenizer, text):
    """Encode ``text`` alone. Returns its token ids, list[int].

    The name of a special token in the text stays ordinary text.
    """
    # tokenizer(text) would turn a passage's own "[gMASK]" into the mask itself.
    if getattr(tokenizer, "do_lower_case", False):
        text = text.lower()
    return tokenizer.convert_tokens_to_ids(tokenizer._tokenize(text)) if text else []


def encode_source(tokenizer, record, src_length):
    """Encode ``[CLS] 答案：{answer}，上下文：{context} [gMASK] <|endoftext|>``.

    Only the context is cut, at its end. Returns at most ``src_length`` ids, list[int]. Raises
    InputError where even an empty context leaves too many ids.
    """
    opening = SOURCE_OPENING.format(answer=record["answer"])
    room = src_length - 3  # [CLS], [gMASK] and <|endoftext|>
    if room < 2 * len(opening) + 8:  # the answer is rarely so long
        length = len(encode_text(tokenizer, opening))
        if length > room:
            raise InputError(
                f"{record['where']}: prompt and answer take {length + 3} tokens, more than "
                f"--src_length {src_length}: raise it or shorten the answer"
            )
    # Opening and context are encoded as one text, as in pre-training: a piece may span the seam.
    ids = encode_text(tokenizer, opening + record["context"])[:room]
    return [
        tokenizer.cls_token_id,
        *ids,
        tokenizer.gmask_token_id,
        tokenizer.eos_token_id,
    ]


def encode_target(tokenizer, question, tgt_length):
    """Encode a question behind the fixed opening. Returns labels, list[int].

    They end with ``<|endofpiece|>`` and are ``tgt_length`` at most.
    """
    ids = encode_text(tokenizer, TARGET_OPENING + question)
    return ids[: tgt_length - 1] + [tokenizer.eop_token_id]


def decode_target(tokenizer, token_ids):
    """Decode generated ids. Returns str, without the fixed opening and special tokens."""
    special = set(tokenizer.all_special_ids)
    # A checkpoint's vocabulary is padded past the tokenizer's: such ids have no text.
    ids = [int(i) for i in token_ids if i < len(tokenizer) and int(i) not in special]
    text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) if ids else ""
    # The opening as the tokenizer writes it.
    opening = tokenizer.convert_tokens_to_string(tokenizer._tokenize(TARGET_OPENING))
    return text[len(opening) :].strip() if text.startswith(opening) else text.strip()


def build_features(tokenizer, source_ids, labels):
    """Set source and target side by side.

    Args:
        source_ids (list[int]): a source of length S, as ``encode_source`` gives it.
        labels (list[int]): T labels, or none where the question is unknown.

    Returns:
        dict: ``input_ids`` [S + T], ``labels`` [T], ``source_length`` S. The arrays are unsigned
        and as narrow as the ids allow, for millions of records. The collator makes the rest.
    """
    input_ids = source_ids + ([tokenizer.sop_token_id] + labels[:-1] if labels else [])
    ids = [*input_ids, *labels]
    ids = np.array(
        ids,
        dtype=np.min_scalar_type(max(ids)),
    )  # one array, of which these are views
    return {
        "input_ids": ids[: len(input_ids)],
        "labels": ids[len(input_ids) :],
        "source_length": len(source_ids),
    }


def build_position_ids(source_length, length, padded_length):
    """Build 2D positions (GLM, arXiv 2103.10360, section 2.2).

    The first row is 0 to S - 1 over the source, then the position of [gMASK]. The second row is
    0 over the source, then 1, 2, 3... Both are 0 over padding.

    Args:
        source_length, length: int [B], of the source and of the whole sequence, without padding.

    Returns:
        int64 [B, 2, padded_length].
    """
    column, source_length = np.arange(padded_length), np.asarray(source_length)[:, None]
    gmask_position = source_length - 2  # the last but one of encode_source
    target = column >= source_length
    position_ids = np.stack(
        [np.where(target, gmask_position, column), (column - source_length + 1) * target],
        axis=1,
    )
    return position_ids * (column < np.asarray(length)[:, None])[:, None]


def build_dataset(tokenizer, records, src_length, tgt_length, quiet=True):
    """Build the features of every record, before training starts.

    So a mistake in the last record shows at once. Unless ``quiet``, there is a bar if it takes
    longer than two seconds.

    Returns:
        list[dict]: see ``build_features``, and ``record`` and its ``index`` in the list.

    Raises:
        InputError: where the lengths have no room for a prompt or a question.
    """
    opening = len(encode_text(tokenizer, TARGET_OPENING))
    if tgt_length < opening + 2:
        raise InputError(
            f"--tgt_length {tgt_length} has no room for a question: its fixed opening takes "
            f"{opening} tokens and the end token one, so give at least {opening + 2}"
        )
    dataset = []
    bar = tqdm(records, "features", delay=2, disable=quiet, dynamic_ncols=True)
    for index, record in enumerate(bar):
        source_ids, labels = encode_source(tokenizer, record, src_length), []
        if record["question"] is not None:
            labels = encode_target(tokenizer, record["question"], tgt_length)
        features = build_features(tokenizer, source_ids, labels)
        dataset.append({**features, "index": index, "record": record})
    return dataset


def read_in_batches(records, batch_size):
    """Yield lists of 1 to ``batch_size`` of those ``records`` that are there already.

    Only the first of a list is waited for. What ends ``records``, an exception too, comes after
    all that came before it.
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


def build_attention_mask(source_length, length, padded_length):
    """Build the mask of who sees whom; rows look at columns.

    Every position sees the whole source, a target position also itself and the targets before
    it, and none sees padding.

    Args:
        source_length, length: int [B], of the source and of the whole sequence, without padding.

    Returns:
        bool [B, 1, padded_length, padded_length].
    """
    column = np.arange(padded_length)
    source = column[None, None, :] < np.asarray(source_length)[:, None, None]  # [B, 1, L]
    real = column[None, None, :] < np.asarray(length)[:, None, None]  # [B, 1, L]
    causal = column[None, None, :] <= column[None, :, None]  # [1, L, L]
    return (source | (causal & real))[:, None]


class DataCollator:
    """Pad features on the right to their longest, rounded up to a multiple of 8, and build the mask.

    Returns:
        dict of numpy arrays, int64 but for the mask: ``input_ids`` [B, L], ``position_ids``
        [B, 2, L], ``attention_mask`` bool [B, 1, L, L], ``source_length`` [B], ``index`` [B];
        and for the N targets of the batch ``labels`` [N] and ``target_positions`` [N], where
        each is predicted in the flattened [B * L].
    """

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, features):
        length = np.array([len(feature["input_ids"]) for feature in features])
        source_length = np.array([feature["source_length"] for feature in features])
        padded_length = -(-length.max() // PAD_MULTIPLE) * PAD_MULTIPLE
        input_ids = np.full(
            [len(features), padded_length],
            self.pad_token_id,
            dtype="int64",
        )
        for row, feature in enumerate(features):
            input_ids[row, : length[row]] = feature["input_ids"]
        target_positions = [
            row * padded_length + np.arange(source_length[row], length[row]) for row in range(len(features))
        ]
        return {
            "input_ids": input_ids,
            "position_ids": build_position_ids(source_length, length, padded_length),
            "attention_mask": build_attention_mask(source_length, length, padded_length),
            "source_length": source_length,
            "index": np.array([feature["index"] for feature in features]),
            "labels": np.concatenate([feature["labels"] for feature in features]).astype(
                "int64",
            ),
            "target_positions": np.concatenate(target_positions),
        }
