"""The one exception for input that a person can put right."""


class InputError(ValueError):
    """Something a user wrote or handed over cannot be used.

    The message is one line that says what is wrong, where, and what would be right; the command line
    prints it as it stands and exits with code 2.
    """
