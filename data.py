"""From a record to a padded batch: reading, prompt, 2D positions, collation.

Nothing here needs a model or a device: features and batches are numpy arrays.
"""

import json
import os
import queue
import threading

import numpy as np
from paddle.io import DistributedBatchSampler
from tqdm import tqdm

from glm.errors import InputError

SOURCE_OPENING = "答案：{answer}，上下文："
TARGET_OPENING = "在已知答案的前提下，问题："
PAD_MULTIPLE = 8  # matrix units want lengths that are multiples of 8


def read_records(task_name, split, require_question=True):
    """Read one split as a list of records, see ``parse_lines``.

    Args:
        task_name (str): ``dureader_qg``, a folder that holds ``{split}.json``, or a file; both as JSON lines.
        split (str): ``train``, ``dev`` or ``test``.
        require_question (bool): whether a record without a question is a mistake.

    Raises:
        InputError: also for a file that is missing or empty.
    """
    if task_name == "dureader_qg" and not os.path.isdir(task_name):
        rows = _load_dureader_qg(split)
        name = f"the {split} split of dureader_qg"
        records = [
            _parse_record(row, f"{name}, record {i}", i, require_question) for i, row in enumerate(rows)
        ]
    else:
        name = os.path.join(task_name, f"{split}.json") if os.path.isdir(task_name) else task_name
        if name == task_name and split != "test":
            raise InputError(
                f"--task_name {task_name} is neither dureader_qg nor a folder: give one of the two"
            )
        try:
            with open(name, "rb") as file:
                records = list(parse_lines(file, name, require_question))
        except OSError as error:
            raise InputError(f"{name}: {error.strerror}: give a file that exists and can be read") from error
    if not records:
        raise InputError(f"{name} has no records: at least one is needed")
    return records


def _load_dureader_qg(split):
    from paddlenlp.datasets import load_dataset  # imports paddle, which readers of folders don't need

    if split not in ("train", "dev"):
        raise InputError(f"dureader_qg has no {split} split: give --task_name a folder with {split}.json")
    try:
        return load_dataset("dureader_qg", splits=split)
    except (
        Exception
    ) as error:  # requests, urllib3 and paddlenlp each raise their own when the host can't be reached
        raise InputError(
            f"dureader_qg could not be downloaded ({type(error).__name__}): check the connection, "
            "or give --task_name a folder with train.json and dev.json"
        ) from error


def parse_lines(lines, name, require_question):
    """Parse JSON lines, blank ones left out, one at a time.

    Args:
        lines: iterable of bytes, such as a file. name (str): what messages call it.

    Yields:
        dict: ``id`` (as given, or the record's number from 0), ``context``, ``answer``, ``question`` (a str, or None
        where there is none) and ``where`` (file and line, for messages).

    Raises:
        InputError: a line that is not UTF-8 or not a JSON object, or a field that is missing, empty or wrongly typed;
            the message names file and line.
    """
    count = 0
    for number, line in enumerate(lines, start=1):
        where = f"{name}:{number}"
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8").strip()
            row = json.loads(text) if text else None
        except UnicodeDecodeError as error:
            raise InputError(
                f"{where}: byte {error.start + 1} is not UTF-8: save the file as UTF-8"
            ) from error
        except (ValueError, RecursionError) as error:
            raise InputError(f"{where}: not JSON ({error}): each line must be one JSON object") from error
        if text:
            yield _parse_record(row, where, count, require_question)
            count += 1


def _parse_record(row, where, number, require_question):
    """Bring either published form of a record (see ``read_records``) into one."""
    if not isinstance(row, dict):
        raise InputError(f"{where}: a {type(row).__name__}: each line must be one JSON object")
    record = {"id": row.get("id", number), "where": where}
    if not isinstance(record["id"], (str, int)):
        raise InputError(
            f"{where}: 'id' is a {type(record['id']).__name__}: it must be a string or a whole number"
        )
    for name, other_name in (("context", "source"), ("answer", "title"), ("question", "target")):
        value = row.get(name, row.get(other_name))
        if name == "question" and not require_question and value in (None, ""):
            value = None
        elif value is None:
            raise InputError(
                f"{where}: the field '{name}' is missing: a record needs context, answer and question"
            )
        elif not isinstance(value, str):
            raise InputError(f"{where}: the field '{name}' is a {type(value).__name__}: it must be a string")
        elif name == "question" and not value.strip():
            raise InputError(f"{where}: the field 'question' is empty: it is what the model learns to write")
        else:
            # A lone surrogate ("\ud800") is legal JSON, but no text: neither the tokenizer nor a file can hold it.
            value = value.encode("utf-8", "replace").decode("utf-8")
        record[name] = value
    return record


def encode_text(tokenizer, text):
    """Token ids of ``text`` alone, list[int]; the name of a special token in the text stays ordinary text.

    ``tokenizer(text)`` would turn a passage's own "[gMASK]" into the mask itself, so this enters one level below it.
    """
    if getattr(tokenizer, "do_lower_case", False):
        text = text.lower()
    return tokenizer.convert_tokens_to_ids(tokenizer._tokenize(text)) if text else []


def encode_source(tokenizer, record, src_length):
    """``[CLS] 答案：{answer}，上下文：{context} [gMASK] <|endoftext|>`` as at most ``src_length`` ids, list[int].

    Only the context is cut, at its end. Raises InputError where even an empty context leaves too many ids.
    """
    opening = SOURCE_OPENING.format(answer=record["answer"])
    room = src_length - 3  # [CLS], [gMASK] and <|endoftext|>
    needed = (
        len(encode_text(tokenizer, opening)) if room < 2 * len(opening) + 8 else 0
    )  # the answer is rarely long
    if needed > room:
        raise InputError(
            f"{record['where']}: prompt and answer take {needed + 3} tokens, more than --src_length {src_length}: "
            "raise it or shorten the answer"
        )
    # Opening and context are encoded as one text, as in pre-training: a piece may span the seam.
    ids = encode_text(tokenizer, opening + record["context"])[:room]
    return [tokenizer.cls_token_id, *ids, tokenizer.gmask_token_id, tokenizer.eos_token_id]


def encode_target(tokenizer, question, tgt_length):
    """Labels of a question, list[int]: the fixed opening, the question, ``<|endofpiece|>``; ``tgt_length`` at most."""
    return encode_text(tokenizer, TARGET_OPENING + question)[: tgt_length - 1] + [tokenizer.eop_token_id]


def decode_target(tokenizer, token_ids):
    """The text of generated ids, the fixed opening and special tokens left out. Returns str."""
    special = set(tokenizer.all_special_ids)
    # A checkpoint's vocabulary is padded past the tokenizer's: such ids have no text.
    ids = [int(i) for i in token_ids if i < len(tokenizer) and int(i) not in special]
    text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) if ids else ""
    opening = tokenizer.convert_tokens_to_string(
        tokenizer._tokenize(TARGET_OPENING)
    )  # as the tokenizer writes it
    return text[len(opening) :].strip() if text.startswith(opening) else text.strip()


def build_features(tokenizer, source_ids, labels):
    """Set source and target side by side.

    Args:
        source_ids (list[int]): a source of length S, as ``encode_source`` gives it.
        labels (list[int]): T labels, or none where the question is unknown.

    Returns:
        dict: ``input_ids`` [S + T], ``labels`` [T], ``source_length`` S: what takes little room, unsigned and as narrow
        as the ids allow, for millions of records and several processes. The collator makes the rest.
    """
    input_ids = source_ids + ([tokenizer.sop_token_id] + labels[:-1] if labels else [])
    ids = [*input_ids, *labels]
    ids = np.array(ids, dtype=np.min_scalar_type(max(ids)))  # one array, of which these are views
    return {
        "input_ids": ids[: len(input_ids)],
        "labels": ids[len(input_ids) :],
        "source_length": len(source_ids),
    }


def build_position_ids(source_length, length, padded_length):
    """2D positions (GLM, arXiv 2103.10360, section 2.2), int64 [B, 2, padded_length], 0 over padding.

    First 0 to S - 1 over the source, then the position of [gMASK]; second 0 over the source, then 1, 2, 3...

    Args:
        source_length, length: int [B], the source's and the whole sequence's real length.
    """
    column, source_length = np.arange(padded_length), np.asarray(source_length)[:, None]
    gmask_position = source_length - 2  # the last but one of encode_source
    target = column >= source_length
    position_ids = np.stack(
        [np.where(target, gmask_position, column), (column - source_length + 1) * target], axis=1
    )
    return position_ids * (column < np.asarray(length)[:, None])[:, None]


def build_dataset(tokenizer, records, src_length, tgt_length, quiet=True):
    """Features of every record, list[dict]; each also holds its ``record`` and its ``index`` in the list.

    Unless ``quiet``, there is a bar if it takes longer than two seconds.

    All are built before training starts, so that a mistake in the last record shows at once. Raises InputError.
    """
    opening = len(encode_text(tokenizer, TARGET_OPENING))
    if tgt_length < opening + 2:
        raise InputError(
            f"--tgt_length {tgt_length} has no room for a question: its fixed opening takes {opening} tokens and the "
            f"end token one, so give at least {opening + 2}"
        )
    dataset = []
    for index, record in enumerate(tqdm(records, "features", delay=2, disable=quiet, dynamic_ncols=True)):
        source_ids = encode_source(tokenizer, record, src_length)
        labels = (
            [] if record["question"] is None else encode_target(tokenizer, record["question"], tgt_length)
        )
        dataset.append({**build_features(tokenizer, source_ids, labels), "index": index, "record": record})
    return dataset


def read_in_batches(records, batch_size):
    """Lists of 1 to ``batch_size`` of the ``records`` that are there already, waiting for none but the first of a list.

    What ends ``records``, an exception too, comes after all that came before it.
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


class GroupedBatchSampler(DistributedBatchSampler):
    """One order of batches for any layout of processes: it depends on the seed, the epoch and the global batch alone.

    The global batches of an epoch are cut into batches of ``batch_size``, which are dealt to the replicas in turn. The
    last global batch is filled up with records of the epoch's beginning.

    Args:
        dataset: features. batch_size (int): of one process in one pass.
        global_batch_size (int): records of one optimizer step over all processes and accumulation passes.
        shuffle (bool): a new order each epoch; else from the longest record to the shortest.
        group_by_length (bool): put records of like length into the same global batch, and let chance order the batches.
    """

    def __init__(
        self, dataset, batch_size, num_replicas, rank, global_batch_size, shuffle, group_by_length, seed
    ):
        super().__init__(dataset, batch_size, num_replicas=num_replicas, rank=rank, shuffle=shuffle)
        self.global_batch_size, self.group_by_length, self.seed = global_batch_size, group_by_length, seed
        self.lengths = np.array([len(feature["input_ids"]) for feature in dataset])
        self.target_lengths = np.array([len(feature["labels"]) for feature in dataset])

    def global_batches(self):
        """Record numbers of an epoch, int64 [global batches, global_batch_size]."""
        rng = np.random.default_rng([self.seed, self.epoch])
        order = (
            rng.permutation(len(self.lengths)) if self.shuffle else np.argsort(-self.lengths, kind="stable")
        )
        count = -(-len(order) // self.global_batch_size)
        order = np.resize(order, count * self.global_batch_size)  # repeats from the beginning
        if not (self.shuffle and self.group_by_length):
            return order.reshape([count, self.global_batch_size])
        # Sorted within chunks of 50 batches: enough to choose from, and another choice each epoch.
        chunk = 50 * self.global_batch_size
        for start in range(0, len(order), chunk):
            part = order[start : start + chunk]
            order[start : start + chunk] = part[np.argsort(-self.lengths[part], kind="stable")]
        return rng.permutation(order.reshape([count, self.global_batch_size]))

    def __iter__(self):
        batches = self.global_batches()
        self.target_tokens = self.target_lengths[batches].sum(1)  # of each global batch of the epoch begun
        self.tokens = self.lengths[batches].sum(1)
        return iter(batches.reshape([-1, self.batch_size])[self.local_rank :: self.nranks].tolist())

    def __len__(self):
        steps = -(-len(self.lengths) // self.global_batch_size)
        return steps * self.global_batch_size // (self.batch_size * self.nranks)


def build_attention_mask(source_length, length, padded_length):
    """Who sees whom: bool [B, 1, padded_length, padded_length], rows look at columns.

    Every position sees the whole source, a target position also itself and the targets before it, none sees padding.

    Args:
        source_length, length: int [B], the source's and the whole sequence's real length.
    """
    column = np.arange(padded_length)
    source = column[None, None, :] < np.asarray(source_length)[:, None, None]  # [B, 1, L]
    real = column[None, None, :] < np.asarray(length)[:, None, None]  # [B, 1, L]
    causal = column[None, None, :] <= column[None, :, None]  # [1, L, L]
    return (source | (causal & real))[:, None]


class DataCollator:
    """Pad features on the right to their longest, rounded up to a multiple of 8, and build the mask.

    Returns:
        dict of numpy arrays: ``input_ids`` int64 [B, L], ``position_ids`` int64 [B, 2, L], ``attention_mask`` bool
        [B, 1, L, L], ``source_length`` int64 [B], ``index`` int64 [B]; and of the N real targets of the batch
        ``labels`` int64 [N] and ``target_positions`` int64 [N], where each is predicted in the flattened [B * L].
    """

    def __init__(self, pad_token_id):
        self.pad_token_id = pad_token_id

    def __call__(self, features):
        length = np.array([len(feature["input_ids"]) for feature in features])
        source_length = np.array([feature["source_length"] for feature in features])
        padded_length = -(-length.max() // PAD_MULTIPLE) * PAD_MULTIPLE
        input_ids = np.full([len(features), padded_length], self.pad_token_id, dtype="int64")
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
            "labels": np.concatenate([feature["labels"] for feature in features]).astype("int64"),
            "target_positions": np.concatenate(target_positions),
        }
