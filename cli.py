"""From a checkout, ``python cli.py …`` is ``moss-jt …``; what it needs is in setup.py."""

from pathlib import Path

import moss_jt

# The installed package holds convert/ and the kernels; in a checkout they lie beside it.
moss_jt.__path__.append(str(Path(__file__).resolve().parent))

if __name__ == "__main__":
    from moss_jt.cli import main

    main()
