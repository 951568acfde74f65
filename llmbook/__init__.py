"""llmbook: a large language model from scratch, one module per chapter of the book.

Every module is generated from the chapter of the same name and imports only from modules of earlier
chapters. Importing the package itself loads nothing: import what you need, for example
``from llmbook.tinyworld import TinyWorld``.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("llmbook")
except PackageNotFoundError:  # a checkout that is on the path and not installed, or a copy
    __version__ = "0+unknown"
