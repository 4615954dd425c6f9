"""What a fresh process runs first to be one in which Fathom is not installed."""

WITHOUT_FATHOM = """
import sys

class NoFathom:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "fathom":
            raise ModuleNotFoundError(f"No module named {name!r}")

sys.meta_path.insert(0, NoFathom())
"""
