"""A conversation in the terminal with any runtime."""

import sys
import time

from export.runtime import Message, Runtime


def converse(runtime: Runtime, max_tokens: int) -> None:
    """Reads turns from standard input until it ends; answers stream to standard output, speed to standard
    error. The whole conversation is rendered by the model's own template in every turn."""
    messages: list[Message] = []
    while True:
        try:
            content = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        messages.append({"role": "user", "content": content})
        runtime.reset()
        started = time.perf_counter()
        logits = runtime.prefill(runtime.chat_ids(messages, add_generation_prompt=True))
        new_ids: list[int] = []
        shown = ""
        first = time.perf_counter()
        while len(new_ids) < max_tokens and int(logits.argmax()) not in runtime.end_of_turn_ids:
            new_ids.append(int(logits.argmax()))
            text = runtime.decode_text(new_ids)
            # A character may be spread over several tokens; it is shown when it is whole.
            if not text.endswith("\ufffd"):
                print(text[len(shown) :], end="", flush=True)
                shown = text
            logits = runtime.decode(new_ids[-1])
        seconds = time.perf_counter() - first
        print(flush=True)
        print(
            f"[{first - started:.2f} s to first token, {len(new_ids) / max(seconds, 1e-9):.1f} tok/s]",
            file=sys.stderr,
        )
        messages.append({"role": "assistant", "content": runtime.decode_text(new_ids)})
