"""Text to token ids and back, and chat templates.

The work is done by the `tokenizers` library, the same that transformers calls, without the seconds
transformers takes to import."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers

from clawdemy_infer.files import chat_template
from clawdemy_infer.from_config.keys import Keys, read_bytes, read_object
from clawdemy_infer.paths import Refused, short

MAX_TOKENIZER_BYTES = 256 * 2**20       # of a tokenizer.json; published ones have up to 35 MB
MAX_TEMPLATE_BYTES = 2**20              # of a chat_template.jinja; published ones have up to 30 kB
MAX_TEMPLATE_SECONDS = 60.0             # on the clock; see `chat_template` for the processor's

DAMAGED = Exception     # what `tokenizers` raises for a damaged file: it has no class of its own


class Tokenizer:
    """A tokenizer as a Hugging Face directory holds it: tokenizer.json, and a chat template if
    there is one."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str | None = None,
                 special: dict[str, str] | None = None) -> None:
        self.backend, self.chat_template, self.special = backend, chat_template, special or {}

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer | None":
        """The tokenizer of a Hugging Face directory; None where it has no tokenizer.json. Raises
        Refused for a file that is damaged, and for a key in it."""
        source, template_file = directory / "tokenizer.json", directory / "chat_template.jinja"
        if not source.exists():
            return None
        content = read_bytes(source, MAX_TOKENIZER_BYTES)
        try:
            backend = tokenizers.Tokenizer.from_buffer(content)
        except DAMAGED as error:
            raise Refused(source, None, why=f"no tokenizer ({str(error).strip()})") from error
        backend.no_truncation()
        backend.no_padding()

        # As transformers has it: where the settings list the added tokens, they know all of them.
        keys = Keys({}, str(source))
        for file in (directory / "tokenizer_config.json", directory / "special_tokens_map.json"):
            if file.exists() and "added_tokens_decoder" not in keys.left:
                keys = Keys(keys.left | read_object(file), keys.source if keys.left else str(file))
        template = keys.left.get("chat_template")
        if template_file.exists():
            template = read_bytes(template_file, MAX_TEMPLATE_BYTES).decode("utf-8", "replace")
        elif isinstance(template, list) and all(isinstance(each, dict) for each in template):
            template = next((each.get("template") for each in template      # each with a name
                             if each.get("name") == "default"), None)
        keys.left["chat_template"] = template
        special = {}
        for name, said in keys.left.items():
            if name.endswith("_token") and not isinstance(said, bool | None):
                special[name] = said.get("content") if isinstance(said, dict) else said
                if not isinstance(special[name], str):
                    keys.refuse(name, said, "a text, or an object with its content")
        return cls(backend, keys.text("chat_template"), special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with a beginning-of-sequence token where the model wants one."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages: Sequence[dict[str, str]],
                  add_generation_prompt: bool = True) -> str:
        """`messages`, each {"role": …, "content": …}, as the text that the model was trained to
        continue.

        Raises ValueError where the model has no chat template, or its template refuses the
        messages."""
        if self.chat_template is None:
            raise ValueError("chat: this model has no chat template; pass a plain prompt")
        variables = {"messages": list(messages), "add_generation_prompt": add_generation_prompt,
                     "tools": None, "documents": None, **self.special}
        try:
            return rendered(self.chat_template, variables)
        except ValueError as error:
            raise ValueError(f"messages={short(messages)}: the chat template refuses them: {error}"
                             ) from error

    def chat(self, messages: Sequence[dict[str, str]],
             add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_text`. The template writes the special tokens itself, so none are
        added."""
        return self.backend.encode(self.chat_text(messages, add_generation_prompt),
                                   add_special_tokens=False).ids


def rendered(template: str, variables: dict[str, Any]) -> str:
    """The text that a template makes of `variables`. Raises ValueError where it fails, or goes on
    beyond the limits of `chat_template`: it runs in a process of its own, which can be ended."""
    command = [sys.executable, "-P", chat_template.__file__]
    try:
        asked = json.dumps({"template": template, "variables": variables}).encode()
        done = subprocess.run(command, input=asked, capture_output=True,
                              timeout=MAX_TEMPLATE_SECONDS)
    except subprocess.TimeoutExpired:
        raise ValueError(f"it is not done after {MAX_TEMPLATE_SECONDS:g} s") from None
    except TypeError as error:
        raise ValueError(f"{error}; texts, numbers, lists and dicts are accepted") from error
    if done.returncode < 0:
        raise ValueError(f"it is not done after {chat_template.MAX_SECONDS} s of the processor")
    if done.returncode:
        lines = done.stderr.decode("utf-8", "replace").strip().splitlines()
        raise ValueError(lines[-1].removeprefix("jinja2.exceptions.") if lines else "it fails")
    return done.stdout.decode("utf-8", "surrogatepass")
