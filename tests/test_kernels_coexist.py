"""`transformers` looks for an unrelated package that is called `kernels`, like our folder: it must
not take ours for that one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="there is no Triton for this system")

REPOSITORY = Path(__file__).parents[1]
GENERATE = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
import clawdemy_kernels.rms_norm as ours
config = LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                     num_attention_heads=2, num_key_value_heads=1)
model = LlamaForCausalLM(config).eval()
made = model.generate(torch.tensor([[3, 5, 7]]), max_new_tokens=2, do_sample=False, pad_token_id=0,
                      eos_token_id=None)
assert made.shape == (1, 5)
found = sys.modules.get("kernels")
print(is_kernels_available(), found and found.__file__, ours.__file__)
"""
STAND_IN = '''
def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    if name.islower():
        return lambda *_, **__: lambda decorated: decorated
    return type(name, (), {"__init__": lambda self, *_, **__: None})
'''


def test_transformers_generates_with_our_folder_on_the_path_and_takes_nothing_from_it(
        monkeypatch, capsys):
    """Without an `__init__.py` ours is no package to be imported as `kernels`, but a place that any
    real one goes before."""
    assert not (REPOSITORY / "kernels" / "__init__.py").exists()
    monkeypatch.syspath_prepend(REPOSITORY)
    exec(GENERATE, {})
    _, imported, ours = capsys.readouterr().out.split()
    assert not imported.startswith(str(REPOSITORY / "kernels"))
    assert Path(ours) == REPOSITORY / "kernels" / "rms_norm.py"


def test_transformers_finds_the_package_that_it_looks_for_behind_our_folder(tmp_path):
    """A stand-in for it, installed; and a process of its own that works where our folder lies."""
    (tmp_path / "kernels").mkdir()
    (tmp_path / "kernels" / "__init__.py").write_text(STAND_IN)
    (tmp_path / "kernels-0.18.5.dist-info").mkdir()
    (tmp_path / "kernels-0.18.5.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.5\n")
    ran = subprocess.run([sys.executable, "-c", GENERATE], cwd=REPOSITORY, capture_output=True,
                         text=True, env=os.environ | {"PYTHONPATH": str(tmp_path)})
    assert ran.returncode == 0, ran.stderr
    available, imported, ours = ran.stdout.split()
    assert (available, imported) == ("True", str(tmp_path / "kernels" / "__init__.py"))
    assert Path(ours).parent == REPOSITORY / "kernels"
