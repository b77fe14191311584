"""The one error a user of NIRVANA is meant to read."""


class InputError(ValueError):
    """Bad input, found at a boundary (parameters, files, model source).

    The message is one line: what was expected, what was given, what to do. The command line prints it
    without a traceback and exits with status 2.
    """
