"""The one error a user of NIRVANA is meant to read."""


class InputError(ValueError):
    """Bad input, found at a boundary (parameters, files, model source).

    The message is one line: what was expected, what was given, what to do. The command line prints it
    without a traceback and exits with status 2.
    """

    def __init__(self, message: str):
        # what libraries say, and what files are called, may have more lines
        super().__init__(" ".join(line.strip() for line in str(message).splitlines()))
