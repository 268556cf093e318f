"""Text to token ids and back, and chat templates.

The work is done by the `tokenizers` library, the same that transformers calls, without the seconds
transformers takes to import.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import tokenizers
from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Tokenizer:
    """A tokenizer as a Hugging Face directory holds it: tokenizer.json, and a chat template if
    there is one."""

    def __init__(self, backend: tokenizers.Tokenizer, chat_template: str | None = None,
                 special: dict[str, str] | None = None) -> None:
        self.backend, self.chat_template, self.special = backend, chat_template, special or {}

    @classmethod
    def from_directory(cls, directory: Path) -> "Tokenizer | None":
        """The tokenizer of a Hugging Face directory; None where it has no tokenizer.json."""
        if not (directory / "tokenizer.json").exists():
            return None
        backend = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
        backend.no_truncation()
        backend.no_padding()
        settings, template_file = {}, directory / "chat_template.jinja"
        if (settings_file := directory / "tokenizer_config.json").exists():
            settings = json.loads(settings_file.read_text("utf-8"))
        template = settings.get("chat_template")
        if template_file.exists():
            template = template_file.read_text("utf-8")
        elif isinstance(template, list):                    # several templates, each with a name
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

    def chat_text(self, messages: Sequence[dict[str, str]],
                  add_generation_prompt: bool = True) -> str:
        """`messages`, each {"role": …, "content": …}, as the text that the model was trained to
        continue.

        Raises ValueError where the model has no chat template, or its template refuses the
        messages.
        """
        if self.chat_template is None:
            raise ValueError("chat: this model has no chat template; pass a plain prompt")
        # The environment in which transformers renders templates. They come with the weights, hence
        # the sandbox.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                                    extensions=["jinja2.ext.loopcontrols"])
        environment.filters["tojson"] = lambda value, indent=None: json.dumps(
            value, ensure_ascii=False, indent=indent)
        environment.globals["raise_exception"] = _refuse
        environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
        try:
            return environment.from_string(self.chat_template).render(
                messages=list(messages), add_generation_prompt=add_generation_prompt, tools=None,
                documents=None, **self.special)
        except TemplateError as error:
            raise ValueError(
                f"messages={messages!r}: the chat template refuses them: {error}") from error

    def chat(self, messages: Sequence[dict[str, str]],
             add_generation_prompt: bool = True) -> list[int]:
        """Token ids of `chat_text`. The template writes the special tokens itself, so none are
        added."""
        return self.backend.encode(self.chat_text(messages, add_generation_prompt),
                                   add_special_tokens=False).ids


def _refuse(message: str) -> NoReturn:
    raise TemplateError(message)
