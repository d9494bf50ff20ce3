"""What a plugin is."""

from __future__ import annotations

NO_RESULT = "No result."  # MOSS was trained with these words where there is none


class Plugin:
    """Something that MOSS can call.

    ``name`` is what the meta instruction's switch calls it, ``api`` how a command is written, such as
    ``"Calculate(expression)"``. In the results, ``Calculate("1+1") =>`` stands before what ``run`` gives: on a line of its own
    where ``own_line``, and not at all where not ``echo``.
    """

    name: str
    api: str
    own_line = False
    echo = True

    @property
    def function(self) -> str:
        return self.api.partition("(")[0]

    def run(self, argument: str) -> str:
        """What calling it with the text ``argument`` gives. What it raises becomes a result, too: "No result: …"."""
        raise NotImplementedError
