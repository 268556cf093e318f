"""What all tests share. Nothing here, and nothing tested, touches the network."""

import os

import torch

os.environ["HF_HUB_OFFLINE"] = "1"      # before anything imports huggingface_hub
if not torch.cuda.is_available():
    # and before anything imports triton, which decides then: without a GPU kernels are interpreted
    os.environ["TRITON_INTERPRET"] = "1"

import pytest  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run: what was green stays green. With CLAWDEMY_RANDOM=1 new ones.
settings.register_profile("same", derandomize=True)
if not os.environ.get("CLAWDEMY_RANDOM"):
    settings.load_profile("same")


@pytest.fixture(scope="session")
def smollm():
    """The real SmolLM2-135M-Instruct in fp32, loaded once. Tests leave it as they found it."""
    from clawdemy_infer.files import load_model

    return load_model("smollm2-135m")
