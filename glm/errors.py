"""How mistakes and faults are told."""


class InputError(ValueError):
    """A mistake in what the user gave, told in one line: what is wrong, where, and what to do."""

    exit_code = 2


class Fault(BaseException):  # as KeyboardInterrupt: a signal must pass what catches every Exception while loading
    """What ended a run and was no mistake of the user's, told in one line."""

    def __init__(self, message, exit_code=1):
        super().__init__(message)
        self.exit_code = exit_code
