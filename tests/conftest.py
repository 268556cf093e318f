"""What all tests share. Nothing here, and nothing tested, touches the network."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"      # before anything imports huggingface_hub

import pytest  # noqa: E402


@pytest.fixture(scope="session")
def smollm():
    """The real SmolLM2-135M-Instruct in fp32, loaded once. Tests leave it as they found it."""
    from clawdemy_infer.model import load_model

    return load_model("smollm2-135m")
