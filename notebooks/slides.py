"""Make slides of the executed notebooks: each `NN_name.ipynb` becomes one HTML file that needs no
network, `build/slides/NN_name.html`.

    python notebooks/slides.py                 every lesson that has cells tagged `slide`
    python notebooks/slides.py 01 02           those whose names begin so

A cell tagged `slide` begins a slide. One tagged `fragment` follows on the same slide at the next
key press, or at once where the slide has no more than a heading so far. `notes` are for the
speaker, of `hide-input` only the outputs are shown, and cells with none of these are on no slide.
In an SVG picture, elements with `data-step` 2, 3, ... follow at the next key presses, and so does
each assignment and assertion of code tagged `by-line`. Notes that begin with `> claim` put it under
the heading of their slide.

Keys: S opens the speaker's window, N shows the notes beside the slides, F is full screen, O an
overview. With `?print-pdf` after the file's name the browser prints one slide a page.
"""

from __future__ import annotations

import base64
import importlib.util
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from html import escape, unescape
from io import BytesIO
from pathlib import Path

import jinja2
import nbformat
from fontTools import subset
from markdown_it import MarkdownIt
from matplotlib import get_data_path
from nbformat import NotebookNode
from PIL import Image, ImageEnhance, ImageFilter
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer, TextLexer

HERE = Path(__file__).resolve().parent
DECKS = HERE.parent / "build" / "slides"
BETWEEN = {"slides": (12, 20), "minutes": (35, 50)}
AT_MOST = {"words": 70, "lines of code": 20, "columns of code": 88, "rows in a table": 8}
MONOSPACED = 110                    # as many columns of printed text fit; a longer line is broken
FONTS = {"DejaVuSans": 'font-family: "DejaVu Sans"',
         "DejaVuSans-Bold": 'font-family: "DejaVu Sans"; font-weight: bold',
         "DejaVuSans-Oblique": 'font-family: "DejaVu Sans"; font-style: italic',
         "DejaVuSansMono": 'font-family: "DejaVu Sans Mono"'}


@dataclass
class Slide:
    """One slide. `cell` says where it begins, `steps` how many key presses it takes so far."""

    cell: str
    number: int
    html: str = ""
    notes: str = ""
    minutes: float = 0
    code: list[str] = field(default_factory=list)
    steps: int = 0

    def counts(self) -> tuple[int, ...]:
        """What the slide holds, in the order of `AT_MOST`. Words are those of its prose alone."""
        prose = re.sub(r"<(pre|table|svg)\b.*?</\1>|<[^>]+>", " ", self.html, flags=re.S)
        words = [word for word in unescape(prose).split() if any(map(str.isalnum, word))]
        lines = "\n".join(self.code).split("\n") if self.code else []
        rows = [len(re.findall(r"<tr[^>]*>\s*<td", table)) for table in self.html.split("<table")]
        return len(words), len(lines), max(map(len, lines), default=0), max(rows)


def read(notebook: NotebookNode) -> tuple[str, list[Slide], list[str]]:
    """The title of an executed notebook, its slides, and what a person must mend in them: one line
    each that names the cell."""
    title, heading, slides, problems = "", "", [], []
    for index, cell in enumerate(notebook.cells):
        tags, source = set(cell.metadata.get("tags", [])), cell.source.strip()
        where = f"cell {index} ({source.partition(chr(10))[0][:50]})"
        prose = source if cell.cell_type == "markdown" else ""
        found = dict(re.findall(r"^(##?) +(.+)$", prose, re.M))
        title, heading = title or found.get("#", ""), found.get("##", heading)
        if "slide" in tags:
            again = f'<h2 class="again">{markdown(heading, inline=True)}</h2>\n'
            slides.append(Slide(where, len(slides) + 1, again * bool(heading and not found)))
        elif not tags & {"fragment", "notes"}:
            continue
        if not slides:
            problems.append(f"{where}: no cell tagged `slide` stands before it")
        elif "notes" in tags:
            if claim := re.match(r"> (.+)\n+", source):
                source = source[claim.end():]
                under = f"</h2>\n<h3>{markdown(claim[1], inline=True)}</h3>"
                slides[-1].html = slides[-1].html.replace("</h2>", under, 1)
            slides[-1].notes += markdown(source)
            slides[-1].minutes += sum(map(float, re.findall(r"\*\*(\d+\.?\d*) min\.\*\*", source)))
        else:
            add(slides[-1], cell, tags, source)
            if formula := re.search(r"\$[^$\n]+\$", re.sub(r"`[^`]*`", "", prose)):
                problems.append(f"{where}: {formula[0]} stays as it is; write formulas as `code`")
    return title, slides, problems + list(limits(slides))


def limits(slides: list[Slide]) -> Iterator[str]:
    """What is too much, or too little."""
    totals = len(slides), sum(slide.minutes for slide in slides)
    for (name, (low, high)), count in zip(BETWEEN.items(), totals, strict=True):
        if slides and not low <= count <= high:
            yield f"the lesson has {count:g} {name}; it should have {low} to {high}"
    for slide in slides:
        for (name, most), count in zip(AT_MOST.items(), slide.counts(), strict=True):
            if count > most:
                yield f"{slide.cell}: its slide has {count} {name}; at most {most} fit"
        if not slide.minutes:
            yield f"{slide.cell}: its slide has no notes that say how long it takes: **2 min.**"


# ---- cells in HTML ----


def add(slide: Slide, cell: NotebookNode, tags: set[str], source: str) -> None:
    """Put a cell on a slide, behind what is there."""
    empty = not re.sub(r"<h2.*?</h2>|</?div[^>]*>", "", slide.html).strip()
    later, first = "fragment" in tags and not empty, slide.steps
    slide.steps += later
    if cell.cell_type == "markdown":
        slide.code += map(str.rstrip, re.findall(r"```\w*\n(.*?)```", source, re.S))
        shown = markdown(source)
    else:
        shown = ""
        if "hide-input" not in tags:
            slide.code.append(source)
            shown = by_line(source, slide) if "by-line" in tags else code(source)
        given = "" if "widget" in tags else "\n".join(outputs(cell, slide))
        if given and "by-line" in tags:                 # behind the last of its lines
            given = f'<div class="fragment" data-fragment-index="{slide.steps}">{given}</div>'
            slide.steps += 1
        shown = f"{shown}\n{given}"
    if shown.strip():
        when = f' fragment" data-fragment-index="{first}' if later else ""
        slide.html += f'<div class="cell{when}">\n{shown.strip()}\n</div>\n'


def markdown(text: str, inline: bool = False) -> str:
    """Markdown in HTML, without links: what they lead to does not lie beside the deck."""
    parser = MarkdownIt("commonmark", {"highlight": lambda text, name, _: code(text, name)})
    html = parser.renderInline(text) if inline else parser.enable("table").render(text)
    return re.sub(r"</?a\b[^>]*>", "", html)


def code(source: str, language: str = "python") -> str:
    """Code in HTML, in colours if it is Python; no two empty lines follow each other."""
    lexer = PythonLexer() if language == "python" else TextLexer()
    shown = highlight(re.sub(r"\n{3,}", "\n\n", source), lexer, HtmlFormatter(nowrap=True))
    return f'<pre class="code">{shown.rstrip()}</pre>'


def by_line(source: str, slide: Slide) -> str:
    """Code in HTML. Its first assignment is there at once; each other one, and each assertion,
    comes at the next key press, with the lines up to the one after it."""
    shown, first, begun = [], slide.steps, False
    source = re.sub(r"\n{3,}", "\n\n", source)
    inside = code(source).removeprefix('<pre class="code">').removesuffix("</pre>")
    for plain, line in zip(source.split("\n"), inside.split("\n"), strict=True):
        if re.match(r"\s*(\w+ \+?= |assert )", plain):
            slide.steps += begun
            begun = True
        if slide.steps > first:
            when = f'data-fragment-index="{slide.steps - 1}"'
            line = f'<span class="fragment" {when}>{line}</span>'
        shown.append(line)
    return '<pre class="code">' + "\n".join(shown) + "</pre>"


def outputs(cell: NotebookNode, slide: Slide) -> Iterator[str]:
    """What a cell gave, each output in the best form that it has."""
    for output in cell.outputs:
        data = output.get("data", {})
        html = data.get("text/html", "")
        if drawing := re.search(r"<svg\b.*</svg>", data.get("image/svg+xml", html), re.S):
            yield f"<figure>{in_steps(drawing[0], slide)}</figure>"
        elif "image/png" in data:
            alt = re.search(r'<img[^>]*\balt="([^"]*)"', html)
            yield picture(data["image/png"], alt[1] if alt else escape(data.get("text/plain", "")))
        elif html:
            html = re.sub(r"<script\b.*?</script>|</?a\b[^>]*>", "", html, flags=re.S)
            yield f'<div class="out">{html}</div>'
        elif "text/markdown" in data:
            yield markdown(data["text/markdown"])
        elif output.get("name") != "stderr":
            # As a terminal shows it: no colours, and of a line that was overwritten only its end.
            text = output.get("text", data.get("text/plain", ""))
            text = re.sub(r"\x1b\[[\d;]*m|[^\n]*\r(?!\n)", "", text).strip("\n")
            kind = ' class="long"' if max(map(len, text.split("\n"))) > MONOSPACED else ""
            yield f"<pre{kind}>{escape(text)}</pre>" if text else ""


def picture(png: str, alt: str) -> str:
    """A PNG as large as the slide allows, and at most twice its size. It is enlarged here, with
    its edges sharpened: a browser leaves them soft. Darker, as its colours suit a dark page too."""
    drawn = Image.open(BytesIO(base64.b64decode(png))).convert("RGBA")
    width, height = drawn.size
    paper = Image.new("RGBA", drawn.size, "white")
    paper.alpha_composite(ImageEnhance.Brightness(drawn).enhance(0.72))
    large = paper.convert("RGB").resize((2 * width, 2 * height), Image.Resampling.LANCZOS)
    large = large.filter(ImageFilter.UnsharpMask(radius=2, percent=150, threshold=0))
    file = BytesIO()
    large.quantize(64, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    data = base64.b64encode(file.getvalue()).decode()
    return (f'<figure><img alt="{alt}" style="max-width: {2 * width}px; max-height: {2 * height}px"'
            f' srcset="data:image/png;base64,{data} 2x"></figure>')


def in_steps(svg: str, slide: Slide) -> str:
    """An SVG picture with its steps as fragments. Its ids get a prefix, or two pictures would share
    their patterns and arrows."""
    mine, first = f"s{slide.number}-{len(slide.html)}-{slide.steps}-", slide.steps
    svg = svg.replace("<svg", '<svg preserveAspectRatio="xMinYMin"', 1)
    svg = re.sub(r'(\bid="|\burl\(["\']?#|\bhref="#|\baria-labelledby=")', rf"\g<1>{mine}", svg)

    def step(found: re.Match) -> str:
        tag, attributes, k = found[1], found[2], int(found[3])
        if k < 2:
            return found[0]
        slide.steps = max(slide.steps, first + k - 1)
        attributes = re.sub(r'\sclass="[^"]*"', "", attributes)
        return f'<{tag} class="step fragment" data-fragment-index="{first + k - 2}"{attributes}>'

    return re.sub(r'<(\w+)([^<>]*\sdata-step="(\d+)"[^<>]*)>', step, svg)


# ---- one file ----


def reveal(file: str) -> str:
    """A file of reveal.js, from the Python package that carries it. Raises `FileNotFoundError` with
    the way to get it."""
    package = importlib.util.find_spec("sphinx_revealjs")   # found, never imported: it wants Sphinx
    if package is None:
        raise FileNotFoundError("reveal.js is not here yet: `make slides` gets it, and so does "
                                "pip install --no-deps sphinx-revealjs -c constraints.txt")
    folder = Path(package.submodule_search_locations[0]) / "_static" / "revealjs"
    return (folder / file).read_text(encoding="utf-8")


def script(file: str) -> str:
    """JavaScript to stand in a page: neither the script's end nor a comment may begin inside."""
    return reveal(file).replace("</script", r"\x3c/script").replace("<!--", r"\x3c!--")


def fonts(text: str) -> str:
    """The fonts in CSS, with no more than the glyphs of `text`."""
    rules = []
    for name, kind in FONTS.items():
        options = subset.Options(flavor="woff", hinting=False, drop_tables=["FFTM"])
        font = subset.load_font(f"{get_data_path()}/fonts/ttf/{name}.ttf", options)
        subsetter, file = subset.Subsetter(options), BytesIO()
        subsetter.populate(text=text)
        subsetter.subset(font)
        subset.save_font(font, file, options)
        data = base64.b64encode(file.getvalue()).decode()
        rules.append(f"@font-face {{ {kind}; src: url(data:font/woff;base64,{data}) }}")
    return "\n".join(rules)


def page(title: str, slides: list[Slide]) -> str:
    """The whole deck in one file."""
    template, style = ((HERE / name).read_text("utf-8") for name in ("slides.html", "slides.css"))
    shown = re.sub(r'base64,[^"]+', "", "".join(slide.html + slide.notes for slide in slides))
    text = unescape(shown) + title + "".join(map(chr, range(32, 127)))
    return jinja2.Template(template).render(
        title=markdown(title, inline=True), slides=slides, fonts=fonts(text), style=style,
        reveal=reveal, script=script)


def make(lesson: Path) -> list[str]:
    """Write the deck of one notebook and return its problems. Without tagged cells there is
    none."""
    title, slides, problems = read(nbformat.read(lesson, as_version=4))
    if not slides:
        print(f"{lesson.name}: no cell is tagged `slide`")
        return []
    html, target = page(title, slides), DECKS / f"{lesson.stem}.html"
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(html, encoding="utf-8")
    minutes = sum(slide.minutes for slide in slides)
    print(f"{target}: {len(slides)} slides, {minutes:g} minutes, {len(html.encode()) / 1e6:.1f} MB")
    return [f"{lesson.name}: {problem}" for problem in problems]


def main(prefixes: list[str]) -> int:
    """Make the decks; status 1 where one has problems, though it is written."""
    lessons = [path for path in sorted(HERE.glob("*.ipynb"))
               if not prefixes or path.name.startswith(tuple(prefixes))]
    problems = [] if lessons else [f"no notebook in {HERE} begins with {' or '.join(prefixes)}"]
    try:
        for lesson in lessons:
            problems += make(lesson)
    except FileNotFoundError as error:
        problems.append(str(error))
    for problem in problems:
        print(problem, file=sys.stderr)
    return bool(problems)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
