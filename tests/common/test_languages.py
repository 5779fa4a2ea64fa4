"""Codes of languages in the metadata of cards."""

from __future__ import annotations

import pytest

from rlhf.common.languages import check_languages, language_metadata

ACCEPTED = "en de no zh eng deu ger cmn gsw haw yue und multilingual code pt-BR zh-Hans-CN es-419"
REFUSED = {
    "english": "did you mean 'en'",
    "Norwegian": "did you mean 'no'",
    "EN": "did you mean 'en'",
    "pt_BR": "did you mean 'pt-br'",
    "xx": None,
    "qqq": None,
    "en-": None,
    "xx-US": None,
    "en US": None,
    "": None,
    "python": None,
}


@pytest.mark.parametrize("language", ACCEPTED.split())
def test_codes_and_tags_are_accepted(language: str):
    check_languages([language], "language")


@pytest.mark.parametrize("language", REFUSED)
def test_other_values_are_refused_in_one_line(language: str):
    with pytest.raises(ValueError, match=r"language: .* is not a code of ISO 639") as caught:
        check_languages(["en", language], "language")
    message, hint = str(caught.value), REFUSED[language]
    assert repr(language) in message
    assert "\n" not in message
    assert message.endswith(f"; {hint}?") if hint else "did you mean" not in message


def test_tags_with_further_parts_are_in_a_key_of_their_own():
    """The Hub refuses them as values of ``language``."""
    assert language_metadata(["pt-BR", "pt", "en", "zh-Hant"]) == {
        "language": ["pt", "en", "zh"],
        "language_bcp47": ["pt-BR", "zh-Hant"],
    }
    assert language_metadata(["code", "en"]) == {"language": ["code", "en"]}
    assert language_metadata([]) == {}
