"""Text to tokens and back, by the Hugging Face `tokenizers` library."""

from __future__ import annotations

from pathlib import Path


def load_tokenizer(path: str | Path):
    """The `tokenizers.Tokenizer` of `path`/tokenizer.json.

    Raises ImportError or FileNotFoundError that say what to do.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError("text needs the tokenizers package: pip install tokenizers") from error
    file = Path(path) / "tokenizer.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} not found: prompts need the model's tokenizer.json")
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise ValueError(f"{file} cannot be read as a tokenizer ({error}); copy it again") from error
