"""From a record to a padded batch: prompt, 2D positions, mask, collation.

Nothing here needs a model or a device: features and batches are numpy arrays.
"""

import unicodedata

import numpy as np
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.errors import InputError

SOURCE_OPENING = "答案：{answer}，上下文："
TARGET_OPENING = "在已知答案的前提下，问题："
PAD_MULTIPLE = 8  # matrix units want lengths that are multiples of 8


def encode_text(tokenizer, text):
    """Encode ``text`` alone. Returns its token ids, list[int].

    The name of a special token in the text stays ordinary text.
    """
    return tokenizer.convert_tokens_to_ids(split_text(tokenizer, text)) if text else []


def split_text(tokenizer, text):
    """Returns the pieces of ``text`` alone, list[str]."""
    if getattr(tokenizer, "do_lower_case", False):
        text = text.lower()
    # tokenizer.tokenize would turn a passage's own "[gMASK]" into the mask itself.
    return tokenizer._tokenize(text)


def encode_source(tokenizer, record, src_length):
    """Encode ``[CLS] 答案：{answer}，上下文：{context} [gMASK] <|endoftext|>``.

    Only the context is cut, at its end.

    Returns:
        at most ``src_length`` ids, list[int], and whether the context was cut, bool.

    Raises:
        InputError: where even an empty context leaves too many ids.
    """
    opening = SOURCE_OPENING.format(answer=record["answer"])
    room = src_length - 3  # [CLS], [gMASK] and <|endoftext|>
    # The answer is rarely so long. NFKC, which the tokenizer applies, makes up to 18 characters of one.
    if room < 2 * len(unicodedata.normalize("NFKC", opening)) + 8:
        length = len(encode_text(tokenizer, opening))
        if length > room:
            raise InputError(
                f"{record['where']}: prompt and answer take {length + 3} tokens, more than "
                f"--src_length {src_length}: raise it or shorten the answer"
            )
    # Opening and context are encoded as one text, as in pre-training: a piece may span the seam.
    ids = encode_text(tokenizer, opening + record["context"])
    source_ids = [tokenizer.cls_token_id, *ids[:room], tokenizer.gmask_token_id, tokenizer.eos_token_id]
    return source_ids, len(ids) > room


def encode_target(tokenizer, question, tgt_length):
    """Encode a question behind the fixed opening.

    Returns:
        labels, list[int], which end with ``<|endofpiece|>`` and are ``tgt_length`` at most, and
        whether the question was cut, bool.
    """
    ids = encode_text(tokenizer, TARGET_OPENING + question)
    return ids[: tgt_length - 1] + [tokenizer.eop_token_id], len(ids) >= tgt_length


def decode_target(tokenizer, token_ids):
    """Decode generated ids. Returns str, without the fixed opening and special tokens."""
    special = set(tokenizer.all_special_ids)
    # A checkpoint's vocabulary is padded past the tokenizer's: such ids have no text.
    ids = [int(i) for i in token_ids if i < len(tokenizer) and int(i) not in special]
    text = tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) if ids else ""
    # The opening as the tokenizer writes it.
    opening = tokenizer.convert_tokens_to_string(split_text(tokenizer, TARGET_OPENING))
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
    # One array, of which the two are views.
    ids = np.array(ids, dtype=np.min_scalar_type(max(ids)))
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
        [np.where(target, gmask_position, column), (column - source_length + 1) * target], axis=1
    )
    return position_ids * (column < np.asarray(length)[:, None])[:, None]


def check_target_length(tokenizer, tgt_length):
    """Raise InputError unless ``tgt_length`` has room for the opening and a question."""
    opening = len(encode_text(tokenizer, TARGET_OPENING))
    if tgt_length < opening + 2:
        raise InputError(
            f"--tgt_length {tgt_length} has no room for a question: its fixed opening takes "
            f"{opening} tokens and the end token one, so give at least {opening + 2}"
        )


def describe_generation(tokenizer, generation, dataset):
    """Log what beam search makes of the fixed opening, which it counts like the question behind it.

    Args:
        generation (GenerationArguments): how it generates.
        dataset (list[dict]): the features of records with questions, if there are any.
    """
    opening, least = len(encode_text(tokenizer, TARGET_OPENING)), generation.min_tgt_length
    # Of the labels, the end token is not counted: the minimum is of tokens before it.
    longest = max((len(features["labels"]) - 1 for features in dataset), default=0)
    if 0 < longest < least:
        logger.warning(
            f"--min_tgt_length {least} is over the longest question of the data, which has {longest} "
            f"tokens with its opening of {opening}: all predictions will be longer"
        )
    elif least:
        logger.eval(
            f"--min_tgt_length {least} counts the {opening} tokens of the fixed opening: a question has "
            f"at least {max(least - opening, 0)}"
        )
    if generation.no_repeat_ngram_size == 1:
        logger.warning(
            "--no_repeat_ngram_size 1 counts the fixed opening too: its words can't stand in a question"
        )


def build_dataset(tokenizer, records, src_length, tgt_length, quiet=True):
    """Build the features of every record, before training starts.

    So a mistake in the last record shows at once. What the features lose of the records is
    counted in a line for each kind. Unless ``quiet``, there is a bar if it takes longer than
    two seconds.

    Returns:
        list[dict]: see ``build_features``, and ``record`` and its ``index`` in the list.

    Raises:
        InputError: where a prompt and its answer take more than ``src_length`` tokens.
    """
    dataset, losses = [], {}
    bar = tqdm(records, "features", delay=2, disable=quiet, dynamic_ncols=True)
    for index, record in enumerate(bar):
        source_ids, source_cut = encode_source(tokenizer, record, src_length)
        labels, target_cut = [], False
        if record["question"] is not None:
            labels, target_cut = encode_target(tokenizer, record["question"], tgt_length)
        found = {
            f"passages are cut at --src_length {src_length}": source_cut,
            f"passages lose their answer, cut at --src_length {src_length}": source_cut
            and is_answer_cut(tokenizer, record, src_length),
            f"questions are cut at --tgt_length {tgt_length}": target_cut,
            "questions have characters that the tokenizer does not know": tokenizer.unk_token_id in labels,
            "passages or answers have characters that the tokenizer does not know": tokenizer.unk_token_id
            in source_ids,
        }
        for loss, is_found in found.items():
            if is_found:
                losses.setdefault(loss, []).append(record["where"])
        features = build_features(tokenizer, source_ids, labels)
        dataset.append({**features, "index": index, "record": record})
    for loss, places in losses.items():
        logger.warning(f"{len(places)} of {len(records)} {loss}, the first at {places[0]}")
    return dataset


def is_answer_cut(tokenizer, record, src_length):
    """Return whether the answer stands in the context, but not in what ``src_length`` leaves of it."""

    def normalize(pieces):
        return tokenizer.convert_tokens_to_string(pieces)

    opening = SOURCE_OPENING.format(answer=record["answer"])
    pieces = split_text(tokenizer, opening + record["context"])
    start = len(normalize(split_text(tokenizer, opening)))
    answer = normalize(split_text(tokenizer, record["answer"]))
    complete, kept = normalize(pieces), normalize(pieces[: src_length - 3])
    return answer in complete[start:] and answer not in kept[start:]


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
