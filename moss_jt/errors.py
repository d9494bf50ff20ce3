"""Errors that a user can cause."""


class MossError(Exception):
    """Something the user can mend. The text is one line: what, where, what to do.

    The command line prints it after ``moss-jt: `` and exits with 1; it never shows a traceback for it.
    """
