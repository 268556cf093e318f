"""Renders a chat template, as a program of its own: `tokenizer.rendered` runs it and kills it.

A template is a program that came with the weights. The sandbox keeps it from files and the network,
and nothing but the end of a process from loops and from filling the memory. Read: a JSON object
with the template and its variables. Written: the text. The environment is that of transformers 5.23
(utils/chat_template_utils.py). Nothing of ours is imported, so that it starts in a tenth of a
second.
"""

import datetime
import json
import sys

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_SECONDS = 2                 # of the processor
MAX_MEMORY_BYTES = 2**29
MAX_CHARACTERS = 10_000_000     # of the text


class Generation(Extension):
    """{% generation %} … {% endgeneration %}, what an assistant said: it is rendered as it is."""

    tags = frozenset({"generation"})

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def tojson(value: object, ensure_ascii: bool = False, indent: int | None = None,
           separators: tuple[str, str] | None = None, sort_keys: bool = False) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def refuse(message: str) -> None:
    raise jinja2.TemplateError(message)


def main() -> None:
    try:
        import resource
        resource.setrlimit(resource.RLIMIT_CPU, (MAX_SECONDS, MAX_SECONDS))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, MAX_MEMORY_BYTES))
    except (ImportError, ValueError, OSError):
        pass                                            # not on every system; the clock still is
    asked = json.load(sys.stdin.buffer)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = tojson
    environment.globals |= {
        "raise_exception": refuse,
        "strftime_now": lambda form: datetime.datetime.now().strftime(form)}
    text = environment.from_string(asked["template"]).render(asked["variables"])
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"the text has more than {MAX_CHARACTERS:,} characters")
    sys.stdout.buffer.write(text.encode("utf-8", "surrogatepass"))


if __name__ == "__main__":
    main()
