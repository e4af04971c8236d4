"""Runs llama.cpp's converter in its own process, with the pre-tokenizer's name given from outside.

The converter tells pre-tokenizers apart by a hash of what they make of one text, and refuses those that it
has not seen. ``--martlet-pre-tokenizer NAME`` answers that question in its place; the token-id gate then
proves or refuses the answer. All other arguments are the converter's own.
"""

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Arguments: the converter's script, optionally ``--martlet-pre-tokenizer NAME``, its arguments."""
    script, *arguments = sys.argv[1:]
    sys.path.insert(0, str(Path(script).parent))
    sys.path.insert(0, str(Path(script).parent / "gguf-py"))
    if arguments[:1] == ["--martlet-pre-tokenizer"]:
        pre_tokenizer = arguments[1]
        arguments = arguments[2:]
        # Both come from the converter's folder, which is not on the path of a type checker.
        import conversion.base  # type: ignore[import-not-found]

        conversion.base.TextModel.get_vocab_base_pre = lambda model, tokenizer: pre_tokenizer
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
