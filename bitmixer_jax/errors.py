"""The one exception that means: what the user gave is wrong."""


class UserError(ValueError):
    """Something the user gave is wrong, and the message says what to do about it.

    The message is one line. The command line prints it without a traceback and exits with status 2.
    """
