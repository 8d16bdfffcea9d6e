"""From arguments to an exit code.

Knows: which failures are one line, what is done about a stream that is gone. Does not know: what a
command does.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Sequence

from cli.exit_codes import DONE, FAILED, INTERRUPTED, USAGE
from cli.parser import build_parser
from offload.errors import one_line
from offload.streams import check_streams, give_up_unwritable


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    debug = False
    try:
        check_streams()
        try:
            arguments = build_parser().parse_args(argv)
        finally:
            sys.stdout.flush()  # --help and --version leave from there
        if arguments.command is None:
            build_parser().print_help(sys.stderr)
            return USAGE
        debug = arguments.debug
        logging.basicConfig(format="offload: %(message)s", level=logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        result: int = arguments.run(arguments)
        sys.stdout.flush()
        return result
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of stdout left, as `head` does
        give_up_unwritable()
        return DONE
    except Exception as error:
        text = one_line(error)
        if isinstance(error, OSError) and sys.stdout in give_up_unwritable():
            text = f"cannot write to stdout: {error.strerror or error}"
        if debug:
            raise
        print(f"offload: error: {text}", file=sys.stderr)
        return FAILED
