"""Counts with their nouns, and keys whose values are secret."""

import pytest

from rlhf.common.text import count_text, first_secret_key, mask_secrets


def test_a_count_has_the_number_of_its_noun():
    texts = [count_text(n, "prompt") for n in (0, 1, 2, 1000)]
    assert texts == ["0 prompts", "1 prompt", "2 prompts", "1,000 prompts"]
    assert [count_text(n, "batch", "batches") for n in (1, 2)] == ["1 batch", "2 batches"]


@pytest.mark.parametrize(
    ("tree", "key"),
    [
        ({"judge": {"password": 123456}}, "judge.password"),
        ({"judge": [{"api_key": "x"}]}, "judge.0.api_key"),
        ({"judge": {"token": ["", "x"]}}, "judge.token.1"),
        ({"password": "", "token": None, "cookie": True, "max_tokens": 5}, None),
    ],
)
def test_a_secret_is_found_by_its_key(tree, key):
    assert first_secret_key(tree) == key


def test_a_private_key_is_masked_whole():
    body = "DEK-Info: AES-128-CBC\n\nMIIE+abc/\n=="
    key = f"-----BEGIN RSA PRIVATE KEY-----\n{body}\n-----END RSA PRIVATE KEY-----"
    assert mask_secrets(f"before {key} after") == "before *** after"
    assert mask_secrets("-----BEGIN PRIVATE KEY----- cut off") == "*** cut off"
