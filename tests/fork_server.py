"""finetune_generation.py, started by a fork, which takes a tenth of a second and not three."""

import contextlib
import json
import os
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import finetune_generation

MOST_SECONDS = 30


def serve():
    """Fork for each line of standard input, a JSON list of arguments, and answer with its exit code and its output."""
    for line in sys.stdin:
        arguments = json.loads(line)
        output = tempfile.TemporaryFile()
        child = os.fork()
        if child == 0:
            os.setsid()
            signal.alarm(MOST_SECONDS)
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            sys.argv = ["finetune_generation.py", *arguments]
            code = 0
            try:
                finetune_generation.main()
            except SystemExit as error:
                code = error.code or 0
            except BaseException:
                sys.excepthook(*sys.exc_info())
                code = 1
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
        _, status = os.waitpid(child, 0)
        with contextlib.suppress(ProcessLookupError):  # a data loader's processes, which have lost it
            os.killpg(child, signal.SIGKILL)
        with output:
            output.seek(0)
            text = output.read().decode(errors="replace")
        print(json.dumps([os.waitstatus_to_exitcode(status), text]), flush=True)


if __name__ == "__main__":
    serve()
