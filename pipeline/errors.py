"""The errors that end a script with one sentence instead of a traceback. `pipeline.run.run` prints them."""


class Stop(Exception):
    """The run cannot continue: a full disk, a killed worker, a diverged loss. The message is one sentence that says
    what happened and what to do; the exit code is 2."""


class InputError(Stop):
    """Bad input: a file, an option, or a combination. The message names it and the fix; nothing was written."""
