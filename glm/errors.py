"""How mistakes and faults are told: in one line, by two exceptions."""

import contextlib


class InputError(ValueError):
    """A mistake in what the user gave, told in one line: what is wrong, where, and what to do."""

    exit_code = 2


class Fault(
    BaseException
):  # as KeyboardInterrupt: a signal must pass what catches every Exception while loading
    """What ended a run and was no mistake of the user's, told in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code


@contextlib.contextmanager
def mistakes(where, advice):
    """Turn an exception of a library within this block into an InputError.

    Its one line says ``where`` (what can't be read or done), what the library said, and the ``advice``.

    Args: where (str), such as "model/config.json can't be loaded". advice (str): what to do.
    """
    try:
        yield
    except InputError:
        raise
    except Exception as error:  # PaddleNLP, its hubs and pickle raise many kinds
        text = str(error)[:200] or type(error).__name__
        raise InputError(f"{where} ({text}): {advice}") from error
