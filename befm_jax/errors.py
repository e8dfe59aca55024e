"""The base of every error that a person can cause and mend."""


class UserError(ValueError):
    """Something the person who started the program can put right.

    The message alone says where (file, line, field), what is wrong and what would be right; the
    entry points print it without a stack trace.
    """
