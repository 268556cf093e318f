"""Text to token ids and back, chat templates, and text that grows as tokens arrive.

The work is done by the `tokenizers` library, the same that transformers calls, without the seconds transformers takes to
import.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer as Backend


class Tokenizer:
    """A tokenizer as a Hugging Face directory holds it: tokenizer.json, and a chat template if there is one."""

    def __init__(self, backend: Backend, chat_template: str | None = None, special: dict[str, str] | None = None) -> None:
        self.backend = backend
        self.chat_template = chat_template
        self.special = special or {}

    @classmethod
    def from_directory(cls, directory: Path) -> Tokenizer | None:
        """The tokenizer of a Hugging Face directory; None where it has no tokenizer.json."""
        if not (directory / "tokenizer.json").exists():
            return None
        backend = Backend.from_file(str(directory / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        settings_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
        settings = json.loads(settings_file.read_text("utf-8")) if settings_file.exists() else {}
        template = template_file.read_text("utf-8") if template_file.exists() else settings.get("chat_template")
        if isinstance(template, list):                                  # several templates, each with a name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        special = {}
        for name in ("bos_token", "eos_token", "pad_token", "unk_token"):
            if token := settings.get(name):
                special[name] = token["content"] if isinstance(token, dict) else token
        return cls(backend, template, special)

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, with a beginning-of-sequence token where the model wants one."""
        return self.backend.encode(text).ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`. Bytes that form no character become U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def chat_text(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """`messages`, each {"role": …, "content": …}, as the text that the model was trained to continue.

        Raises ValueError where the model has no chat template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise ValueError("chat: this model has no chat template; pass a plain prompt")
        # The environment in which transformers renders templates. They come with the weights, hence the sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None, documents=None, **self.special)
        except TemplateError as error:
            raise ValueError(f"messages={messages!r}: the chat template refuses them: {error}") from error

    def chat(self, messages: Sequence[dict[str, str]], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_text`. The template writes the special tokens itself, so none are added."""
        return self.backend.encode(self.chat_text(messages, add_generation_prompt), add_special_tokens=False).ids


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)


class TextStream:
    """Tokens in, text out: each piece is whole characters, and never part of a stop string.

    A character may be spread over several tokens, and a stop string too. What might still become either is held back until
    the next token decides. The pieces joined together are `text`.
    """

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str] = ()) -> None:
        self.tokenizer, self.stop = tokenizer, tuple(stop)
        self.text = ""                      # released for good
        self.held = ""                      # decoded, but perhaps the beginning of a stop string
        self.stopped = False
        self._ids: list[int] = []
        self._start = self._read = 0        # ids before _read are decoded; _start is where the piece before began

    def push(self, token: int) -> str:
        """Take one more token; return the text that it settles, perhaps none. Sets `stopped` at a stop string."""
        self._ids.append(token)
        fresh = self._undecoded()
        if fresh.endswith("\ufffd"):                                    # a character that is not yet whole
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._settle(fresh)

    def close(self) -> str:
        """No more tokens: return all that was held back, unless a stop string came."""
        if self.stopped:
            return ""
        rest = self._settle(self._undecoded())
        if not self.stopped:
            rest += self.held
            self.text += self.held
        self.held, self._read = "", len(self._ids)
        return rest

    def _undecoded(self) -> str:
        # Some tokenizers drop the space before the first word of a text. So the new tokens are decoded behind those of the
        # piece before, and what these give alone is cut away.
        known = self.tokenizer.decode(self._ids[self._start:self._read])
        return self.tokenizer.decode(self._ids[self._start:])[len(known):]

    def _settle(self, piece: str) -> str:
        text = self.held + piece
        found = [at for stop in self.stop if (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self.held, released = True, "", text[:min(found)]
        else:
            kept = max((n for stop in self.stop for n in range(1, len(stop)) if text.endswith(stop[:n])), default=0)
            released, self.held = text[:len(text) - kept], text[len(text) - kept:]
        self.text += released
        return released
