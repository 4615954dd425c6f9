"""`python -m fathom VERB ...`, the same as `fathom VERB ...`."""

from .scripts.cli import entry_point

if __name__ == "__main__":
    entry_point()
