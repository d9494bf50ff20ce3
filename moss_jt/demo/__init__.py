"""The model that comes with moss-jt: small, to try the program with; ``demo/`` in the repository made it."""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent
NOTE = "This is the small demo model. MOSS itself: moss-jt convert weights fnlp/moss-moon-003-sft DIR, then chat with -m DIR."
