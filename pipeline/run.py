"""Run a script's main: errors become one sentence and an exit code."""

import io
import os
import re
import sys
import time
from collections.abc import Callable
from typing import NoReturn

from pipeline.errors import Stop


def run(main: Callable[[], object]) -> None:
    """Run a script's main. A `Stop` becomes one sentence on stderr and exit code 2; Ctrl-C exits with 130.

    Under torchrun every rank usually meets the same bad input. Rank 0 prints it; the others wait, so that torchrun,
    which tears everything down at the first exit, does not silence it. An error on one rank alone is printed there.
    """
    rank = int(os.environ.get("RANK", 0))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # for names and texts the terminal cannot show
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch on Linux: huge pages make fresh tensors cost a quarter
    try:
        main()
    except Stop as error:
        if rank > 0:
            time.sleep(10)
        print(f"error: {error}", file=sys.stderr, flush=True)
        exit_at_once(2)
    except RuntimeError as error:
        # gloo raises a plain RuntimeError for a lost peer; only its text sets it apart.
        if "RANK" not in os.environ or not re.search("Connection|NCCL", str(error)):
            raise
        print(f"rank {rank}: another process of this run has ended.", file=sys.stderr, flush=True)  # it printed why
        exit_at_once(1)
    except KeyboardInterrupt:
        print("\nInterrupted; run the same command again to continue.", file=sys.stderr, flush=True)
        exit_at_once(130)


def exit_at_once(code: int) -> NoReturn:
    """Leave without waiting for other ranks: a process group's clean-up would hang when one rank is gone."""
    sys.stdout.flush()
    if "RANK" in os.environ:
        os._exit(code)
    sys.exit(code)
