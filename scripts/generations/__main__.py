"""Writes `docs/generations.md`, its Chinese twin and their pictures: what each generation of DeepSeek changed.

    python -m fathom.scripts.generations [FOLDER]

A test compares the files in `docs` with what would be written now. Run this again when it fails.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from .page import ROOT, files


def main(argv: Sequence[str]) -> int:
    folder = Path(argv[0]) if argv else ROOT / "docs"
    for name, content in files().items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content, encoding="utf-8")
        print(file)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
