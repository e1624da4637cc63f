"""All readers by their names."""

from tests.fuzz import files, pictures
from tests.fuzz.reader import READERS

__all__ = ["READERS", "files", "pictures"]
