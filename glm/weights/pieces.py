"""What a sentencepiece file may hold: texts, and none that makes much of little.

sentencepiece loads any bytes as a piece, and any as what a character is written as. The first text that
has one would end the run; a character that becomes a million takes a passage's memory.

The file is a message of protobuf. The readers of it that sentencepiece and PaddleNLP bring want another
protobuf than the one that Paddle needs, so the few fields are found here.
"""

from collections.abc import Iterator

LONGEST = 200  # bytes or characters: NFKC makes 18 characters of one
NORMALIZERS, CHARACTERS = (3, 5), (2,)  # the fields: before encoding and after decoding; their table
FIXED = {1: 8, 5: 4}  # bytes of a value by its wire type


def check_pieces(model) -> None:
    """Raise ValueError where a text in a SentencePieceProcessor, loaded, is no UTF-8, or is too long."""
    if max(map(len, model.IdToPiece(list(range(len(model)))))) > LONGEST:  # or a UnicodeDecodeError
        raise ValueError(f"a piece of its vocabulary is longer than {LONGEST} characters")
    for normalizer in find_fields(model.serialized_model_proto(), NORMALIZERS):
        for table in find_fields(normalizer, CHARACTERS):
            # The length of a trie, the trie, and texts that end with 0.
            texts = table[4 + int.from_bytes(table[:4], "little") :]
            str(texts, "utf-8")
            if max(map(len, texts.split(b"\0"))) > LONGEST:
                raise ValueError(f"it writes a character as more than {LONGEST} bytes")


def find_fields(message: bytes, numbers: tuple) -> Iterator[bytes]:
    """Yield the texts, bytes and messages in the fields ``numbers`` of a message of protobuf.

    Raises:
        ValueError: where it is none.

    Example: of bytes 08 05 12 02 68 69 field 1 is the number 5, and ``find_fields(..., (2,))`` yields b"hi".
    """
    at = 0
    while at < len(message):
        key, at = read_number(message, at)
        size = FIXED.get(key & 7, 0)
        if key & 7 in (0, 2):
            size, at = read_number(message, at)
        if key & 7 == 2 and key >> 3 in numbers:
            yield message[at : at + size]
        at += size if key & 7 else 0


def read_number(message: bytes, at: int) -> tuple[int, int]:
    """Return the number of seven bits a byte that begins at ``at``, and where it ends."""
    number = 0
    for shift in range(0, 70, 7):
        if at >= len(message):
            break
        number |= (message[at] & 127) << shift
        at += 1
        if message[at - 1] < 128:
            return number, at
    raise ValueError("it is damaged: no number where one is needed")
