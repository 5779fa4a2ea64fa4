"""Language codes in the metadata of model cards and dataset cards."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path

_OTHER_VALUES = frozenset({"multilingual", "code"})
"""Values of the key ``language`` that are not codes."""
_OTHER_CODES = (
    "aar abk afr aka alb amh ara arg arm asm ava ave aym aze bak bam baq bel ben bih bis bod bos "
    "bre bul bur cat ces cha che chi chu chv cor cos cre cym cze dan deu div dut dzo ell eng epo "
    "est eus ewe fao fas fij fin fra fre fry ful geo ger gla gle glg glv gre grn guj hat hau hbs "
    "heb her hin hmo hrv hun hye ibo ice ido iii iku ile ina ind ipk isl ita jav jpn kal kan kas "
    "kat kau kaz khm kik kin kir kom kon kor kua kur lao lat lav lim lin lit ltz lub lug mac mah "
    "mal mao mar may mis mkd mlg mlt mon mri msa mul mya nau nav nbl nde ndo nep nld nno nob nor "
    "nya oci oji ori orm oss pan per pli pol por pus que roh ron rum run rus sag san sin slk slo "
    "slv sme smo sna snd som sot spa sqi srd srp ssw sun swa swe tah tam tat tel tgk tgl tha tib "
    "tir ton tsn tso tuk tur twi uig ukr urd uzb ven vie vol wel wln wol xho yid yor zha zho zul "
    "zxx"
)
"""Codes of ISO 639-2 and 639-3 that the list of `datasets` does not have, because the language has
a code of ISO 639-1, or because they name no language."""
_TAG = re.compile(
    r"(?P<language>[a-z]{2,3})(-[a-z]{4})?(-([a-z]{2}|\d{3}))?"
    r"(-([a-z\d]{5,8}|\d[a-z\d]{3}))*(-[a-z\d](-[a-z\d]{2,8})+)*",
    re.IGNORECASE,
)
"""A tag of BCP 47 that begins with a code of ISO 639: language, script, region, variants and
extensions."""


@cache
def _names_of_codes() -> Mapping[str, str]:
    """Return code of ISO 639 -> English name, from the list of the package `datasets`.

    The list is read without an import of the package, which takes seconds. It has the two-letter
    code of a language, or the three-letter code if there is no two-letter one. The result is empty
    if `datasets` is not installed or has no list.
    """
    spec = importlib.util.find_spec("datasets")
    for folder in (spec.submodule_search_locations or ()) if spec else ():
        path = Path(folder, "utils", "resources", "languages.json")
        if path.is_file():
            return json.loads(path.read_text(encoding="utf-8"))
    return {}


def _is_code(code: str) -> bool:
    """Return whether a code is in ISO 639-1, 639-2 or 639-3; if that is unknown, True."""
    known = _names_of_codes()
    return not known or code in known or code in _OTHER_CODES.split()


def check_languages(languages: Iterable[str], option: str) -> None:
    """Check that the Hugging Face Hub accepts these languages in the metadata of a card.

    Args:
        languages: Codes of ISO 639, tags of BCP 47, ``multilingual`` or ``code``.
        option: Option with the languages, for the error.

    Raises:
        ValueError: A language is none of these.
    """
    for language in languages:
        tag = _TAG.fullmatch(language)
        primary = tag["language"] if tag else ""
        if language in _OTHER_VALUES or (primary.islower() and _is_code(primary)):
            continue
        name = language.strip().lower()
        codes = [code for code in (name, name.replace("_", "-")) if _TAG.fullmatch(code)]
        codes += [code for code, known in _names_of_codes().items() if known.lower() == name]
        known = [code for code in codes if _is_code(code.partition("-")[0])]
        hint = f"; did you mean {known[0]!r}?" if known else ""
        raise ValueError(
            f"{option}: {language!r} is not a code of ISO 639 (en, deu), a tag of BCP 47 (pt-BR), "
            f"'multilingual' or 'code'{hint}"
        )


def language_metadata(languages: Iterable[str]) -> dict[str, list[str]]:
    """Return the metadata of a card for some languages, which `check_languages` accepts.

    The Hub accepts codes of ISO 639 under ``language``, and tags of BCP 47 with further parts only
    under ``language_bcp47``.
    """
    languages = list(dict.fromkeys(languages))
    codes = list(dict.fromkeys(language.partition("-")[0] for language in languages))
    tags = [language for language in languages if "-" in language]
    metadata = {"language": codes, "language_bcp47": tags}
    return {name: values for name, values in metadata.items() if values}
