"""The C++ step built for other processors, by another compiler and under sanitizers, as a program
of its own, says what the layers say."""

import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_model_step_cpp import CACHES, ODD, ROOM, SHAPE, STEPS, agree, random_model

from clawdemy_infer.fast import cpp
from clawdemy_infer.fast.faster import faster

pytestmark = pytest.mark.skipif(not cpp.available(), reason="no C++ compiler here")

PROGRAM = Path(__file__).with_name("step_elsewhere.cpp")
PLAIN = [flag for flag in cpp.FLAGS if flag not in ("-fPIC", "-shared")]
NEON = [flag for flag in PLAIN if "vector-width" not in flag]
SANITIZED = [*PLAIN, "-O1", "-g", "-march=native", "-fsanitize=address,undefined",
             "-fno-sanitize-recover=all", "-fsanitize-recover=alignment"]
TARGETS = {
    **{isa: ([os.environ.get("CXX", "g++"), *PLAIN, f"-march={name}"], [])
       for isa, name in cpp.ISA.items() if isa},
    "sanitized": ([os.environ.get("CXX", "g++"), *SANITIZED], []),
    "clang": (["clang++", *PLAIN, "-march=native"], []),
    "NEON": (["aarch64-linux-gnu-g++", *NEON, "-static", "-march=armv8-a"], ["qemu-aarch64"]),
}
"""What compiles it, and what runs it."""


class Elsewhere:
    """The function `step`, run by `command` in a process of its own: what it writes is copied to
    where the pointers lead."""

    def __init__(self, runner, command, file):
        self.runner, self.command, self.file = runner, command, file

    def tensors(self, pointers):
        """The memory behind pointers, as bytes."""
        known = {}
        for each in (*self.runner.kept, *self.seen):
            tensor = getattr(each, "panels", each)
            if tensor is not None:
                storage = tensor.untyped_storage()
                known[tensor.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(
                    storage)[tensor.data_ptr() - storage.data_ptr():]
        return [known[pointer] for pointer in pointers]

    def __call__(self, *arguments):
        pointers, numbers = arguments[:12], arguments[12:]
        fields = [0, 2, 4, 6, 8, 9, 10, 11, 12]             # of a layer, that are pointers
        layers = self.runner.layers.clone()
        used = sorted({*pointers, *layers[:, fields].flatten().tolist()} - {0})
        index = {0: 0} | {pointer: i + 1 for i, pointer in enumerate(used)}
        for row in layers:
            for field in fields:
                row[field] = index[int(row[field])]
        arrays = self.tensors(used)
        said = [layers.view(torch.uint8).flatten() if pointer == pointers[2] else array
                for pointer, array in zip(used, arrays, strict=True)]
        head = torch.tensor([len(used), *map(len, said), *(index[each] for each in pointers),
                             *numbers])
        with self.file.open("wb") as file:
            for each in (head.view(torch.uint8), *said):
                file.write(each.numpy().tobytes())
        subprocess.run([*self.command, str(self.file)], check=True, timeout=300)
        written = bytearray(self.file.read_bytes())
        data = torch.frombuffer(written, dtype=torch.uint8)[8 * len(head):]
        for pointer, array in zip(used, arrays, strict=True):
            if pointer != pointers[2]:
                array.copy_(data[:len(array)])
            data = data[len(array):]


@pytest.mark.parametrize(("format", "shape"), [
    ("fp32", ODD), ("bf16", replace(SHAPE, window=9)), ("int8", replace(SHAPE, F=121, D=90)),
    ("int4", SHAPE)], ids=["fp32", "bf16", "int8", "int4"])
@pytest.mark.parametrize("target", TARGETS)
def test_a_step_says_the_same_wherever_it_is_compiled(target, format, shape, tmp_path, monkeypatch):
    command, runs = TARGETS[target]
    for program in (command[0], *runs):
        if not shutil.which(program):
            pytest.skip(f"{program} is not installed")
    if target in cpp.ISA:
        with monkeypatch.context() as forced:
            forced.setenv("CLAWDEMY_ISA", target)
            try:
                cpp.isa()
            except ValueError as error:
                pytest.skip(str(error))
    defines, library = {}, cpp.library
    monkeypatch.setattr(cpp, "library", lambda name, **fixed: (
        name == "step" and defines.update(fixed), library(name, **fixed))[1])
    eager = random_model(shape)
    here, there = faster(eager, format, compile=True), faster(eager, format, compile=True)
    options = [f"-D{key}={value}" for key, value in defines.items()]
    built = subprocess.run([*command, *options, f"-I{cpp.FOLDER}", str(PROGRAM), "-o",
                            str(tmp_path / "step")], capture_output=True, text=True)
    assert built.returncode == 0, built.stderr[-2000:]
    elsewhere = Elsewhere(there.runner, [*runs, str(tmp_path / "step")], tmp_path / "arrays")
    there.runner.code = elsewhere
    remember = cpp.pointers
    monkeypatch.setattr(cpp, "pointers", lambda *tensors: (
        setattr(elsewhere, "seen", tensors), remember(*tensors))[1])
    caches = [CACHES["paged"](model, 3, ROOM) for model in (here, there)]
    for cache in caches:
        cache.keys.fill_(torch.nan), cache.values.fill_(torch.nan)
    for new in STEPS:
        right, got = (model.step(new, cache, logits_to_keep=0)
                      for model, cache in zip((here, there), caches, strict=True))
        if format == "fp32":
            agree(got, right)
        else:                           # what a processor rounds to bf16 another keeps in fp32
            got, right = got.float(), right.float()
            assert (got - right).abs().mean() < 0.02 * right.std()
