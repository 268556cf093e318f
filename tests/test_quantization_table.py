"""The large table: every place filled once, kept on disk and not judged again; and the one in
data/, of which a piece is made anew."""

import json
import re
import zlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from clawdemy_infer.arithmetic import ModelShape
from clawdemy_infer.cli import main as cli
from clawdemy_infer.files.directory import destinations, to_hf
from clawdemy_infer.model import Decoder, ModelConfig
from clawdemy_infer.rigs.quality import Reference
from clawdemy_infer.rigs.quantization_table import (
    cells,
    quantization_table,
    read_table,
    shipped_table,
    through_cache,
    write_table,
)
from clawdemy_infer.rigs.text import calibration_tokens, evaluation_tokens
from clawdemy_infer.variants.int4_cache import KiviCache


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    shape = ModelShape(name="small", source="test", L=1, D=64, N=2, K=1, H=32, F=128, V=49152,
                       tied=True, max_context=96)
    return Decoder(ModelConfig(shape)).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def directory(small, smollm, tmp_path_factory):
    """The small model with a real tokenizer."""
    folder = tmp_path_factory.mktemp("small")
    save_file({name: tensor.contiguous()
               for name, tensor in destinations(small).items()}, folder/"model.safetensors")
    (folder / "config.json").write_text(json.dumps(to_hf(small.config)))
    smollm.tokenizer.backend.save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture(scope="module")
def filled(directory, tmp_path_factory):
    file = tmp_path_factory.mktemp("table") / "table.jsonl"
    assert cli.main(ask(directory, file)) == 0
    return file


def ask(directory, file, *more):
    return [
        "evaluate", "--table",
        str(file), "--reference",
        str(directory), "--sequences", "2", "--length", "40", "--json", *more
    ]


def test_every_place_is_filled_once(filled):
    source, rows = read_table(filled)
    places = [(row.method, row.format) for row in rows]
    assert places == [(cell.method, cell.format)
                      for cell in cells()] and len(set(places)) == len(places)
    formats = {format for method, format in places if method not in ("KV cache", "–")}
    assert formats == {"int8", "int4-g64", "int4-g32", "int3-g64", "nf4", "mxfp4", "nvfp4"}
    assert {method
            for method, _ in places} - {"–", "KV cache", "int8 activations"} == {
                "RTN", "LLM.int8", "SmoothQuant", "GPTQ", "GPTQ act-order", "AWQ"
            }
    assert {"command", "model", "text", "machine", "date", "torch"} <= source.keys()
    by_place = {place: row for place, row in zip(places, rows, strict=True)}
    assert by_place["RTN", "int4-g32"].bits == 4.5 and by_place["–", "bf16"].stored*2 == by_place[
        "–", "fp32"].stored
    assert by_place["–", "fp32"].quality.kl == by_place["KV cache", "fp32"].quality.kl == 0
    assert all(row.quality.kl > 0 for row in rows if row.format != "fp32")


def test_what_the_file_has_is_not_judged_again(filled, directory, tmp_path, capsys):
    lines = filled.read_text().splitlines(keepends=True)
    file = tmp_path / "begun.jsonl"
    file.write_text("".join(lines[:-3]))  # all but three rows, as after Ctrl-C
    assert cli.main(ask(directory, file)) == 0
    result = capsys.readouterr()
    assert result.err.count(
        ": KL ") == 3 and "RTN int8: KL" not in result.err and "AWQ int3-g64: KL" in result.err
    assert [row["quality"] for row in json.loads(result.out)["rows"]] == [
        json.loads(line)["quality"] for line in lines[1:]
    ]


@pytest.mark.parametrize(("more", "said"), [
    (["--sequences", "1"], "table.jsonl: text='2 sequences of 40 tokens, crc32"),
    (["somewhere"], "directory='somewhere' .*: --table makes"),
])
def test_a_table_of_another_text_is_not_continued(more, said, filled, directory, capsys):
    before = filled.read_text()
    assert cli.main(ask(directory, filled, *more)) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and filled.read_text() == before


def test_evaluate_without_anything_to_evaluate_is_refused(capsys):
    assert cli.main(["evaluate"]) == 2
    error = capsys.readouterr().err
    assert "directory is missing; accepted: a quantized model's, or --table" in error


def test_a_damaged_line_is_named(filled, tmp_path):
    file = tmp_path / "torn.jsonl"
    file.write_text(filled.read_text()[:-40])
    with pytest.raises(
            ValueError,
            match=f"line {len(filled.read_text().splitlines())} is not one of a kept table"):
        read_table(file)


def test_rows_come_back_from_disk(filled, tmp_path):
    source, rows = read_table(filled)
    write_table(tmp_path / "copy.jsonl", source, rows)
    assert (tmp_path / "copy.jsonl").read_text() == filled.read_text()
    again = read_table(tmp_path / "copy.jsonl")[1]
    assert repr(quantization_table(again)) == repr(quantization_table(rows))


def test_a_cache_is_judged_as_if_each_token_came_alone(small):
    """Steps of 32 tokens through the 4-bit cache, whose newest 32 are kept in full, against steps
    of one."""
    tokens = torch.randint(0, 49152, (1, 70), generator=torch.Generator().manual_seed(2))
    at_once, alone = (through_cache(small, KiviCache, step)(tokens) for step in (32, 1))
    exact = small(tokens)
    assert torch.allclose(at_once/exact.std(), alone/exact.std(),
                          atol=1e-4) and (at_once - exact).abs().max() > 1e-3*exact.std()


# -- the table in data/ ---------------------------------------------------------------------------


def test_the_kept_table_meets_what_is_said_of_it():
    source, rows = shipped_table()
    quality = {(row.method, row.format): row.quality for row in rows}
    assert quality["GPTQ act-order", "int4-g64"].kl <= 0.16
    assert quality["GPTQ act-order",
                   "int4-g64"].kl < quality["GPTQ", "int4-g64"].kl < quality["RTN", "int4-g64"].kl
    assert all(
        quality["AWQ", name].kl < 0.9*quality["RTN", name].kl for name in ("int4-g64", "int3-g64"))
    assert [(row.method, row.format) for row in rows] == [(cell.method, cell.format)
                                                          for cell in cells()]
    assert {row.bits for row in rows if row.format == "int4-g64"} == {4.25}
    assert source["model"] == "smollm2-135m" and source[
        "command"] == "clawdemy-infer evaluate --table"


def test_a_piece_of_the_kept_table_made_anew(smollm):
    source, rows = shipped_table()
    place = ("RTN", "int4-g64")
    row = next(row for row in rows if (row.method, row.format) == place)
    sequences, length = int(source["text"].split()[0]), int(source["text"].split()[3])
    tokens = evaluation_tokens(smollm.tokenizer, sequences, length)
    if f"{zlib.crc32(tokens.numpy().tobytes()):08x}" not in source["text"]:
        pytest.skip("this Python's documentation is worded differently")
    reference = Reference(smollm, tokens[:1])
    cell = next(cell for cell in cells() if (cell.method, cell.format) == place)
    again = cell.make(reference, lambda count: calibration_tokens(smollm.tokenizer, count))
    assert again.quality.kl == pytest.approx(float(row.quality.kls[0]), rel=2e-3)
    assert again.bits == row.bits and again.stored == row.stored


def test_the_results_show_rows_of_it():
    page = (Path(__file__).parents[1] / "notebooks" / "RESULTS.md").read_text("utf-8")
    shown = page.split("$ clawdemy-infer evaluate --table\n…\n")[1].split("\n…\n")[0].splitlines()
    lines = [set(" ".join(row).split()) for row in quantization_table(shipped_table()[1]).rows]
    assert len(shown) > 8 and all(
        any(set(line.split()) <= other for other in lines) for line in shown[2:])
