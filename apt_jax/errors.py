"""The one exception that is meant for a user's eyes."""


class UserError(Exception):
    """Something the user can mend: a wrong key, a missing file, a shape that does not fit.

    The message is one line, says what is wrong and, after a semicolon, how to mend it. The
    command line prints it as it is and exits with status 2; nothing in the package catches it.
    """

    def __init__(self, message: str):
        super().__init__(" ".join(str(message).split()))
