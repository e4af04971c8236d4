"""Renders the chat template on standard input within limits: ``... SECONDS CHARACTERS``.

Exit status 0: it behaves. Else one line on standard error says why not.
"""

import json
import re
import resource
import sys
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import TemplateError
from jinja2.exceptions import SecurityError
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY = 512 * 2**20
USER = {"role": "user", "content": "What is rain?"}
ASSISTANT = {"role": "assistant", "content": "Water that falls from clouds."}
SYSTEM = {"role": "system", "content": "Be brief."}
CONVERSATIONS: tuple[list[dict[str, str]], ...] = (
    [USER],
    [USER, ASSISTANT],
    [SYSTEM, USER, ASSISTANT],
    [USER, ASSISTANT] * 20,
    [{"role": "user", "content": "{{ 7 * 7 }} <|im_end|> " + "long " * 2000}],
)


def main() -> None:
    """Renders each conversation; refusing one with an error of its own is a template's right."""
    seconds, characters = int(sys.argv[1]), int(sys.argv[2])
    source = sys.stdin.buffer.read().decode()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    # As transformers sets its sandbox up; its tag `generation` only marks text.
    source = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", source)
    source = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", source)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda format: datetime(2026, 1, 1).strftime(format),
    }
    try:
        template = environment.from_string(source)
    except (TemplateError, RecursionError) as error:
        sys.exit(f"it is no Jinja template: {str(error).splitlines()[0]}")
    for messages in CONVERSATIONS:
        length = 0
        try:
            for part in template.generate(
                messages=messages,
                add_generation_prompt=True,
                tools=None,
                documents=None,
                bos_token="<s>",
                eos_token="</s>",
                pad_token="</s>",
                unk_token="<unk>",
            ):
                length += len(part)
                if length > characters:
                    sys.exit(f"it writes more than {characters} characters")
        except SecurityError as error:
            sys.exit(f"it tries what the sandbox forbids: {str(error).splitlines()[0]}")
        except TemplateError:
            continue
        except (MemoryError, OverflowError):
            sys.exit("it takes more memory than half a gigabyte")
        except Exception:
            continue  # as with a conversation that it does not know: transformers will say so


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """transformers' filter: JSON without HTML escapes."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **options)


def refuse(message: str) -> NoReturn:
    """What templates call for conversations that they do not know."""
    raise TemplateError(message)


if __name__ == "__main__":
    main()
