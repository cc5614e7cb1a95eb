"""From a record to a padded batch: prompt, 2D positions, mask, collation.

Nothing here needs a model or a device: features and batches are numpy arrays.
"""

import numpy as np
from paddlenlp.utils.log import logger
from tqdm import tqdm

from glm.errors import InputError
from glm.templates import get_templates

SPACE = "\u2581"  # as sentencepiece writes it
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


def encode_source(tokenizer, record, src_length, truncation="end"):
    """Encode ``[CLS]``, the source template with the record's fields, ``[gMASK] <|endoftext|>``.

    Args:
        truncation (str): what stays of the template's last field where that is too long: its beginning
            (``end``), or the part around the record's answer (``answer``).

    Returns:
        at most ``src_length`` ids, list[int], and what the text lost, list[str] for ``build_dataset``.

    Raises:
        InputError: where even an empty last field leaves too many ids.
    """
    room, losses = src_length - 3, []  # [CLS], [gMASK] and <|endoftext|>
    # The template is encoded as one text, as in pre-training: a piece may span a seam.
    text = "".join(get_templates(tokenizer).source.fill(record))
    pieces = split_text(tokenizer, text)
    if len(pieces) > room:
        pieces, losses = cut_passage(tokenizer, record, pieces, src_length, truncation)
    ids = tokenizer.convert_tokens_to_ids(pieces) if pieces else []
    if tokenizer.unk_token_id in ids:
        losses = [*losses, "sources have characters that the tokenizer does not know"]
    return [tokenizer.cls_token_id, *ids, tokenizer.gmask_token_id, tokenizer.eos_token_id], losses


def cut_passage(tokenizer, record, pieces, src_length, truncation):
    """Cut the passage, which is the last field of the source.

    Args:
        pieces (list[str]): of the source. src_length, truncation: as ``encode_source`` has them.

    Returns:
        the pieces that stay, and what the passage lost, list[str].

    Raises:
        InputError: where what may not be cut is too long.
    """

    def join(text):
        return "".join(split_text(tokenizer, text))

    # Places are found in the pieces' own text: NFKC makes up to 18 characters of one. A piece at a seam is
    # not the passage's.
    template = get_templates(tokenizer).source
    *before, _, after = template.fill(record)
    text, ends = "".join(pieces), np.cumsum([len(piece) for piece in pieces])
    head = split_text(tokenizer, "".join(before))
    start, stop = len("".join(head)), len(text) - len(join(after).lstrip(SPACE))
    first = int(np.searchsorted(np.append(0, ends[:-1]), start))
    last = max(int(np.searchsorted(ends, stop, side="right")), first)  # the first piece behind it
    fixed = len(pieces) - (last - first)
    room = src_length - 3 - fixed
    if room < 0:
        prompt, *fields = dict.fromkeys(("prompt", *template.fields[:-1]))
        raise InputError(
            f"{record['where']}: {' and '.join((prompt, *fields))} take{'' if fields else 's'} {fixed + 3} "
            f"tokens, more than --src_length {src_length}: raise it"
            + "".join(f" or shorten the {name}" for name in fields)
        )
    begin, losses = first, [f"passages are cut at --src_length {src_length}"]
    if "answer" in template.fields[:-1]:
        answer = join(record["answer"]).lstrip(SPACE)
        place = text.find(answer, start, stop)
        if truncation == "answer" and place >= 0:
            answer_begin = int(np.searchsorted(ends, place, side="right"))
            answer_end = int(np.searchsorted(ends, place + len(answer))) + 1
            if answer_end > first + room:  # it does not fit from the beginning: the window is around it
                margin = max(room - (answer_end - answer_begin), 0) // 2
                begin = max(min(answer_begin - margin, last - room), first)
        if place >= 0 and answer not in "".join(pieces[:first] + pieces[begin : begin + room])[start:]:
            losses.append(f"passages lose their answer, cut at --src_length {src_length}")
    # In front of a window there is no piece that holds the passage's beginning.
    head = head if begin > first >= len(head) else pieces[:first]
    return head + pieces[begin : begin + room] + pieces[last:], losses


def encode_target(tokenizer, text, tgt_length):
    """Encode a target behind its fixed opening.

    Returns:
        labels, list[int], which end with ``<|endofpiece|>`` and are ``tgt_length`` at most, and what the
        text lost, list[str] for ``build_dataset``.
    """
    ids, losses = encode_text(tokenizer, get_templates(tokenizer).target.parts[0] + text), []
    if len(ids) >= tgt_length:
        losses.append(f"targets are cut at --tgt_length {tgt_length}")
    labels = ids[: tgt_length - 1] + [tokenizer.eop_token_id]
    if tokenizer.unk_token_id in labels:
        losses.append("targets have characters that the tokenizer does not know")
    return labels, losses


def encode_opening(tokenizer):
    """Returns the ids of a target's fixed opening, list[int], which may be empty."""
    return encode_text(tokenizer, get_templates(tokenizer).target.parts[0])


def decode_target(tokenizer, token_ids):
    """Decode generated ids. Returns str, without the fixed opening and special tokens."""
    special = set(tokenizer.all_special_ids)

    def decode(token_ids):
        # A checkpoint's vocabulary is padded past the tokenizer's: such ids have no text.
        ids = [int(i) for i in token_ids if i < len(tokenizer) and int(i) not in special]
        return tokenizer.convert_tokens_to_string(tokenizer.convert_ids_to_tokens(ids)) if ids else ""

    return decode(token_ids).removeprefix(decode(encode_opening(tokenizer))).strip()


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
    ids, length = [*input_ids, *labels], len(input_ids)
    # One array, of which the two are views.
    ids = np.array(ids, dtype=np.min_scalar_type(max(ids)))
    return {"input_ids": ids[:length], "labels": ids[length:], "source_length": len(source_ids)}


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
    """Raise InputError unless ``tgt_length`` has room for the opening and a text behind it."""
    opening = len(encode_opening(tokenizer))
    if tgt_length < opening + 2:
        raise InputError(
            f"--tgt_length {tgt_length} has no room for a text: its fixed opening takes "
            f"{opening} tokens and the end token one, so give at least {opening + 2}"
        )


def describe_generation(tokenizer, generation, dataset):
    """Log what beam search makes of the fixed opening, which it counts like the text behind it.

    Args:
        generation (GenerationArguments): how it generates.
        dataset (list[dict]): the features of records with targets, if there are any.
    """
    opening, least = len(encode_opening(tokenizer)), generation.min_tgt_length
    # Of the labels, the end token is not counted: the minimum is of tokens before it.
    longest = max((len(features["labels"]) - 1 for features in dataset), default=0)
    if 0 < longest < least:
        logger.warning(
            f"--min_tgt_length {least} is over the longest target of the data, which has {longest} "
            f"tokens with its opening of {opening}: all predictions will be longer"
        )
    elif least and opening:
        logger.eval(
            f"--min_tgt_length {least} counts the {opening} tokens of the fixed opening: the text behind it "
            f"has at least {max(least - opening, 0)}"
        )
    if generation.no_repeat_ngram_size == 1 and opening:
        logger.warning(
            "--no_repeat_ngram_size 1 counts the fixed opening too: its words can't stand behind it"
        )


def build_dataset(tokenizer, records, src_length, tgt_length, truncation="end", quiet=True):
    """Build the features of every record, before training starts.

    So a mistake in the last record shows at once. What the features lose of the records is counted in a line
    for each kind. Unless ``quiet``, there is a bar if it takes longer than two seconds.

    Returns:
        list[dict]: see ``build_features``, and ``record`` and its ``index`` in the list.

    Raises:
        InputError: where a prompt and its fields take more than ``src_length`` tokens.
    """
    dataset, losses, templates = [], {}, get_templates(tokenizer)
    bar = tqdm(records, "features", delay=2, disable=quiet, dynamic_ncols=True)
    for index, record in enumerate(bar):
        source_ids, source_losses = encode_source(tokenizer, record, src_length, truncation)
        reference, labels, target_losses = templates.get_reference(record), [], []
        if reference is not None:
            labels, target_losses = encode_target(tokenizer, reference, tgt_length)
        for loss in source_losses + target_losses:
            losses.setdefault(loss, []).append(record["where"])
        features = build_features(tokenizer, source_ids, labels)
        dataset.append({**features, "index": index, "record": record})
    for loss, places in losses.items():
        logger.warning(f"{len(places)} of {len(records)} {loss}, the first at {places[0]}")
    return dataset


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
