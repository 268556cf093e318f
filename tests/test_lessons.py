"""The form of a lesson, for those in the second form: one question, its beats in order, 45 minutes
in the core, slides with notes, words of the field."""

import re
from pathlib import Path

import nbformat
import pytest
from test_notebooks import NOTEBOOKS, code_cells, has_core, mime_types, tags
from test_notebooks import texts as texts_of_outputs

FOLDER = Path(__file__).parents[1] / "notebooks"
READ = {path.stem: nbformat.read(path, as_version=4) for path in NOTEBOOKS}
LESSONS = [name for name, notebook in READ.items() if has_core(notebook) and name[0] != "A"]
APPENDICES = [name for name in READ if name[0] == "A"]
BEATS = ["Question", "Envelope", "Guess", "Build", "Measure", "Reconcile", "On a GPU",
         "When does it lose?", "Play", "Check yourself", "Further", "Solutions"]
CELLS, WORDS, CODE_LINES, TABLES, ROWS, FIGURES, COLUMNS = 30, 1200, 120, 4, 8, 4, 88
MINUTES = re.compile(r"\*\*(\d+(?:\.\d)?) min\.\*\*")
HOME_MADE = re.compile(
    r"\b(seats?|keepers?|dear|doorkeepers?|talkers?|rectangles?|heard? of|hears of|grown-ups?|"
    r"start(s|ing|ed)? (an |the |its )?operations?|tokens? (that )?(stand|fall)s?|touchy|riddles?|"
    r"so (is|are|does|do) [A-Z\w]+ rows|hasten\w*)\b", re.IGNORECASE)

each_lesson = pytest.mark.parametrize("name", LESSONS)
each_of_both = pytest.mark.parametrize("name", LESSONS + APPENDICES)


def cells_of(name, *wanted):
    return [cell for cell in READ[name].cells if set(wanted) <= tags(cell)]


def texts(cell):
    return texts_of_outputs(cell) if cell.cell_type == "code" else ()


def words(text: str) -> int:
    """Words of prose: no code blocks, no markup, no notes in comments."""
    text = re.sub(r"```.*?```|<!--.*?-->|<[^>]+>|\(https?://[^)]*\)", " ", text, flags=re.DOTALL)
    return len(re.findall(r"[A-Za-z][\w'’-]*", text))


def prose(cell):
    if cell.cell_type == "markdown":
        yield cell.source
    else:
        yield from (output.data["text/markdown"] for output in cell.outputs
                    if "text/markdown" in output.get("data", {}))


def headings(name):
    return [(len(marks), title) for cell in READ[name].cells if cell.cell_type == "markdown"
            for marks, title in re.findall(r"^(#+) (.+)$", re.sub(
                r"```.*?```", "", cell.source, flags=re.DOTALL), re.MULTILINE)]


# -- the beats ------------------------------------------------------------------------------------


def test_three_lessons_at_least_are_in_the_second_form():
    assert LESSONS[:3] == ["00_your_machine", "01_counting_inference", "02_kv_cache"]


@each_lesson
def test_every_beat_has_its_heading_in_order(name):
    assert [title for level, title in headings(name) if level == 2] == BEATS


@each_of_both
def test_headings_begin_with_one_title_and_skip_no_level(name):
    levels = [level for level, _ in headings(name)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))


@each_lesson
def test_the_beginning_says_minutes_and_what_must_be_known(name):
    beginning = " ".join(cell.source for cell in READ[name].cells[:4])
    assert re.search(r"\d+ minutes", beginning) and re.search(r"[Bb]efore", beginning)


# -- how much -------------------------------------------------------------------------------------


def tables(cell):
    """Rows of each table that a cell shows."""
    for text in [cell.source] if cell.cell_type == "markdown" else texts(cell):
        if "<table" in text:
            yield text.count("<tr") - 1
        elif lines := re.findall(r"^\|.*\|$", text, re.MULTILINE):
            yield len(lines) - 2


@each_lesson
def test_the_core_is_short_enough_for_45_minutes(name):
    core = cells_of(name, "core")
    shown = [cell for cell in core if cell.cell_type == "code" and "hide-input" not in tags(cell)]
    rows = [count for cell in core for count in tables(cell)]
    size = {"cells": (len(core), CELLS),
            "words": (sum(words(text) for cell in core for text in prose(cell)), WORDS),
            "code lines": (sum(bool(line.strip()) for cell in shown
                               for line in cell.source.splitlines()), CODE_LINES),
            "tables": (len(rows), TABLES), "rows of a table": (max(rows, default=0), ROWS),
            "figures": (sum("image/png" in mime_types(cell) for cell in core
                            if cell.cell_type == "code"), FIGURES)}
    assert not {what: sizes for what, sizes in size.items() if sizes[0] > sizes[1]}


@each_of_both
def test_no_line_of_code_is_too_wide_for_a_projector(name):
    lines = [line for cell in code_cells(READ[name]) for line in cell.source.splitlines()]
    assert not [line for line in lines if len(line) > COLUMNS]


@each_lesson
def test_a_lesson_runs_within_a_minute_on_two_quiet_cores(name):
    """Each cell that took over 15 s says so; none may have taken longer than the whole."""
    assert sum(cell.metadata.get("seconds", 0) for cell in cells_of(name, "core")) <= 60


# -- what is asked --------------------------------------------------------------------------------


@each_lesson
def test_something_is_guessed_built_measured_and_explained(name):
    code = "\n".join(cell.source for cell in cells_of(name, "core") if cell.cell_type == "code")
    for call in ("guess", "predict", "reveal", "build", "measure", "cause", "explain"):
        assert f"lesson.{call}(" in code, call
    assert len(cells_of(name, "core", "build")) == 1


@each_of_both
def test_exercises_have_several_steps_and_are_open_with_solutions_at_the_end(name):
    notebook = READ[name]
    asked = [cell for cell in notebook.cells if {"exercise", "build"} & tags(cell)]
    assert sum("exercise" in tags(cell) for cell in asked) >= (3 if name in LESSONS else 1)
    for cell in asked:
        task = re.search(r"lesson\.(steps|build)\(\s*[\"'](\w+)[\"']", cell.source)
        shown = "".join(text for text in texts(cell)).splitlines()
        assert "..." in cell.source and shown and all(line[0] == "○" for line in shown), task[2]
        if task[1] == "steps":
            assert f"exercise:{task[2]}" in tags(cell) and len(shown) >= 2, task[2]
        [solution] = [other for other in notebook.cells if f"solution:{task[2]}" in tags(other)]
        assert re.match(r"<details><summary>.*</summary>", solution.source), task[2]
        assert solution.source.rstrip().endswith("</details>"), task[2]
    places = [place for place, cell in enumerate(notebook.cells) if "solution" in tags(cell)]
    assert places == list(range(places[0], len(notebook.cells))), "solutions end a lesson"


def test_no_question_is_asked_twice_in_the_course():
    names = [tag for name in READ for cell in READ[name].cells for tag in tags(cell)
             if tag.startswith(("exercise:", "solution:"))]
    assert len(names) == len(set(names))


# -- slides ---------------------------------------------------------------------------------------


@each_lesson
def test_there_are_12_to_20_slides_each_with_notes_and_minutes(name):
    slides, minutes = [], 0.0
    for cell in READ[name].cells:
        if "slide" in tags(cell):
            slides.append(0)
        if "notes" in tags(cell):
            assert slides, "notes before the first slide"
            slides[-1] += 1
            minutes += float(MINUTES.search(cell.source)[1])
    assert 12 <= len(slides) <= 20
    assert set(slides) == {1}, "one cell of notes to a slide"
    assert 35 <= minutes <= 50


# -- words and pictures ---------------------------------------------------------------------------


@each_of_both
def test_lessons_use_the_words_of_the_field(name):
    found = [hit[0] for cell in READ[name].cells for text in [cell.source, *texts(cell)]
             if (hit := HOME_MADE.search(text))]
    assert not found


@each_of_both
def test_formulas_need_no_typesetter(name):
    """A deck has none with the network off."""
    assert not [cell.source for cell in READ[name].cells if cell.cell_type == "markdown"
                and re.search(r"(?<![\w`\\])\$[^$\n`]+\$(?!\w)", cell.source)]


@each_of_both
def test_every_figure_and_diagram_has_an_alternative_text(name):
    for cell in code_cells(READ[name]):
        for output in cell.outputs:
            data = output.get("data", {})
            if {"image/png", "image/svg+xml"} & data.keys():
                alt = re.search(r'alt="([^"]*)"', data["text/html"])
                assert alt and len(alt[1]) > 30, cell.source


# -- the glossary ---------------------------------------------------------------------------------

GLOSSARY = re.findall(r"^- \*\*(.+?)\*\*: (.+) \((A?\d+(?:, A?\d+)*)\)$",
                      (FOLDER / "glossary.md").read_text(), re.MULTILINE)


def test_the_glossary_lists_each_term_once_in_order_with_one_sentence():
    listed = [line for line in (FOLDER / "glossary.md").read_text().splitlines()
              if line.startswith("- ")]
    assert len(listed) == len(GLOSSARY) > 30
    terms = [term.lower() for term, *_ in GLOSSARY]
    assert terms == sorted(set(terms))
    for term, sentence, _ in GLOSSARY:
        assert sentence.endswith(".") and ". " not in sentence.replace("e.g. ", ""), term


@pytest.mark.parametrize("term, sentence, lessons", GLOSSARY, ids=[term for term, *_ in GLOSSARY])
def test_a_lesson_that_the_glossary_names_uses_the_term(term, sentence, lessons):
    stem = re.sub(r" \(.*\)$", "", term).lower().rstrip("s")
    for number in lessons.split(", "):
        [name] = [name for name in READ if name.startswith(f"{number}_")]
        text = " ".join(text for cell in READ[name].cells for text in [cell.source, *texts(cell)])
        assert stem in text.lower().replace("\n", " "), f"lesson {number} never says {term!r}"
