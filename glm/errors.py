"""How mistakes and faults are reported: in one line, by two exceptions."""

import contextlib
import re
import traceback

LONGEST_LINE = 1000  # characters


class InputError(ValueError):
    """A mistake in what the user gave, in one line: what is wrong, where, and what to do."""

    exit_code = 2


# A BaseException, as KeyboardInterrupt is: a signal passes what catches every Exception.
class Fault(BaseException):
    """What ended a run and was no mistake of the user's, in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


def printable(text, limit=LONGEST_LINE):
    """Return ``text`` as one line of at most ``limit`` characters, all of which can be printed.

    What a file holds may stand in it: an escape sequence would change the terminal, and a line break
    forge a line of this project's.
    """
    text = text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 + 5 :]}"
    text = "".join(
        character if character.isprintable() else " " if character.isspace() else repr(character)[1:-1]
        for character in text
    )
    # Escapes are longer than what they stand for.
    return text if len(text) <= limit else f"{text[: limit // 2]} ... {text[-limit // 2 + 5 :]}"


def is_out_of_memory(error):
    """Return whether an exception is for want of memory, on a card or a CPU.

    Paddle raises MemoryError, but within a backward pass an OSError that quotes it.
    """
    return isinstance(error, MemoryError) or "ResourceExhausted" in str(error) or "MemoryError" in str(error)


def paddle_reason(error):
    """Return the line of an exception of Paddle's that says what has failed, str.

    Before it stand calls in C++ and maybe the error's kind alone, behind it advice for other systems and
    a place in Paddle's source.
    """
    text = str(error).rpartition("Error Message Summary:")[2]
    lines = (line.strip() for line in text.splitlines())
    said = (line for line in lines if re.search(r"\w", line) and not line.endswith(":"))
    return next(said, type(error).__name__)


def error_line(message):
    """Return the last line of a run that ends by a mistake or a fault, str."""
    return printable("finetune_generation.py: error: " + " ".join(message.split()))


@contextlib.contextmanager
def as_input_error(where, advice, kinds=Exception):
    """Turn an exception of a library within this block into an InputError.

    Its one line says ``where`` (what can't be read or done), what the library said, and the ``advice``.

    Args:
        where (str): such as "model/config.json can't be loaded".
        advice (str): what to do.
        kinds: the exceptions to turn; PaddleNLP, its hubs and pickle raise many.
    """
    try:
        yield
    except InputError:
        raise
    except kinds as error:
        if is_out_of_memory(error):  # which is no mistake in a file
            raise
        # Some of PaddleNLP's assertions have no words, only a line of code.
        line = traceback.extract_tb(error.__traceback__)[-1].line
        text = str(error)[:200] or f"{type(error).__name__}: {line}"
        raise InputError(f"{where} ({text}): {advice}") from error
