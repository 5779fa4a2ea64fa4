"""A policy with random weights that the studies' tests share."""

import pytest

from tests.helpers.models import tiny_model


@pytest.fixture(scope="session")
def policy_folder(tmp_path_factory):
    """A folder with a Llama of two layers and its tokenizer."""
    folder = tmp_path_factory.mktemp("policy")
    model, tokenizer = tiny_model()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
