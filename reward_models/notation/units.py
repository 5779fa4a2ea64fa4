"""Units, currencies and scale words that may follow a number."""

from __future__ import annotations

import re

from rlhf.reward_models.notation.lexer import word_set

PERCENT = "%"

SCALES = {"hundred": 10**2, "thousand": 10**3, "million": 10**6, "billion": 10**9,
          "trillion": 10**12, "dozen": 12}  # fmt: skip

_UNIT_SPELLINGS = {
    PERCENT: "percent pct",
    "deg": "degree degrees",
    "$": "dollar dollars usd",
    "€": "euro euros eur",
    "£": "pound_sterling gbp",
    "¥": "yen",
    "₹": "rupee rupees inr",
    "cent": "cent cents",
    "mm": "mm millimeter millimeters millimetre millimetres",
    "cm": "cm centimeter centimeters centimetre centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometre kilometres kms",
    "in": "inch inches",
    "ft": "ft foot feet",
    "yd": "yd yard yards yds",
    "mile": "mile miles mi",
    "g": "g gram grams",
    "mg": "mg milligram milligrams",
    "kg": "kg kilogram kilograms kgs",
    "lb": "lb lbs pound pounds",
    "oz": "oz ounce ounces",
    "ton": "ton tons tonne tonnes",
    "l": "l L liter liters litre litres",
    "ml": "ml mL milliliter milliliters millilitre millilitres",
    "gal": "gallon gallons gal",
    "s": "s sec secs second seconds",
    "ms": "ms millisecond milliseconds",
    "min": "min mins minute minutes",
    "h": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years yr yrs",
    "mph": "mph",
    "kph": "kph kmph kmh",
    "mps": "mps",
    "mpg": "mpg",
    "Nm": "Nm",
    "rad": "rad radian radians",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "V": "V volt volts",
    "Hz": "Hz hertz",
    "K": "K kelvin",
    "degC": "celsius centigrade",
    "degF": "fahrenheit",
    "unit": "unit units",
}
_UNIT_BY_WORD = {
    word: unit for unit, spelled in _UNIT_SPELLINGS.items() for word in spelled.split()
}
_POWER_WORDS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}
_PRODUCTS = {
    "mph": {"mile": 1, "h": -1},
    "kph": {"km": 1, "h": -1},
    "mps": {"m": 1, "s": -1},
    "mpg": {"mile": 1, "gal": -1},
    "Nm": {"N": 1, "m": 1},
}
"""Exponents of the factors of units that have a name of their own."""
LENGTHS = ("mm", "cm", "m", "km", "in", "ft", "yd", "mile")

NOT_UNITS = word_set(
    "or and not nor but altogether halves thirds quarters fourth fourths fifth fifths sixth "
    "sixths tenth tenths hundredth hundredths thousandth thousandths to than then is are was "
    "be am pm a an the minus plus times over by of if because since as so o'clock modulo mod "
    "versus vs either neither only no never maybe perhaps possibly about more less fewer "
    "greater at least most through until till between from i we he she it they you which that "
    "who where when with without except squared cubed factorial st nd rd th wrong incorrect "
    "false true right correct sure actually instead rather wait hmm january february march "
    "april may june july august september october november december hundred thousand million "
    "billion trillion dozen half quarter third one two three four five six seven eight nine "
    "ten eleven twelve tens hundreds thousands millions billions trillions dozens fails fail "
    "failed cannot can't doesn't don't didn't won't wouldn't isn't wasn't does do did will would "
    "could should excluded ruled rejected nope untrue impossible unlike doubtful unlikely "
    "doubled tripled halved below binary octal hex hexadecimal basis lakh crore lakhs crores bn mn "
    "mln mil grand gross thou kilo mega giga millionth millionths billionth billionths eleven "
    "twelve twenty thirty forty fifty sixty seventy eighty ninety zero likely seem seems look "
    "looks sound sounds appear appears feel feels too must has have had guess guessed let suppose "
    "assume assuming imagine noon midnight probably under beneath underground overdrawn negative "
    "point something bc bce "
)
"""Words that are never units, because they change the value or begin another clause."""


_DEGREES = ("degree", "degrees")
_TEMPERATURE_SCALES = {"C": "degC", "F": "degF"}
_POWER_AFTER_UNIT = re.compile(
    rf"(?<![^\W\d_])({'|'.join(sorted(_UNIT_BY_WORD, key=len, reverse=True))})"
    r"([ -]+)(?:(squared)|cubed)\b",
    re.I,
)


def with_powers_before_units(text: str) -> str:
    """Return the text with ``square meters`` in place of ``meters squared``, and so on.

    Only powers of known units are changed: ``5 squared`` is a power of the number.
    """
    return _POWER_AFTER_UNIT.sub(
        lambda match: f"{'square' if match[3] else 'cubic'} {match[1]}", text
    )


def temperature_scale(word: str) -> str | None:
    """Return the unit of a temperature scale after a degree sign, None for any other word."""
    unit = _TEMPERATURE_SCALES.get(word) or known_unit(word)
    return unit if unit in _TEMPERATURE_SCALES.values() else None


def known_unit(word: str) -> str | None:
    """Return the canonical spelling of the unit ``word``, or None if it is not a known unit."""
    if word in _UNIT_BY_WORD:
        return _UNIT_BY_WORD[word]
    return None if len(word) == 1 else _UNIT_BY_WORD.get(word.lower())  # M is not a meter


def cannot_end_unit(word: str) -> bool:
    """Return whether a unit cannot end with a word, as in ``5 square``."""
    return word.lower() in _POWER_WORDS or word in ("/", "per")


def canonical_unit(names: list[str]) -> str:
    """Return the canonical spelling of a unit, for example ``m^2`` for ``square meters``.

    The factors of a product of known units are sorted, and factors with negative exponents follow a
    slash: ``kg m/s`` for ``m * kg * s^-1``. Other units keep their order; their unknown words are
    converted to lower case and to the singular.

    Args:
        names: The words of the unit. A word can also be "*", "/", a power such as "^2" or "^-1", or
            a bracket.
    """
    if [word.lower() for word in names] == ["per", "cent"]:
        return PERCENT
    if len(names) == 2 and names[0].lower() in _DEGREES and (scale := temperature_scale(names[1])):
        return scale
    exponents = _exponents_of_factors(names)
    if exponents:
        return _spelled_product(exponents)
    parts, power = [], ""
    for word in names:
        if word.lower() in _POWER_WORDS:
            power = _POWER_WORDS[word.lower()]
        elif word.startswith("^") and parts:
            parts[-1] += word
        elif word in ("/", "per"):
            parts.append("/")
        elif word != "*":
            parts.append((canonical_unit_in_product(word) or _lower_case_singular(word)) + power)
            power = ""
    return " ".join(parts).replace(" / ", "/")


def canonical_unit_in_product(word: str) -> str | None:
    """Return the canonical spelling of a unit inside a unit, where "in" is the inch.

    The result is None for an unknown unit.
    """
    return "in" if word == "in" else known_unit(word)


def _exponents_of_factors(names: list[str]) -> dict[str, int] | None:
    """Return the exponent of each factor of a product of known units.

    Returns:
        None if a word is not a known unit, if factors cancel, or if it is open whether a factor is
        in the denominator, as K in ``J/kg K``.
    """
    exponents: dict[str, int] = {}
    latest: dict[str, int] = {}
    sign, power, bracketed, closed = 1, 1, False, False
    for name in names:
        unit = canonical_unit_in_product(name)
        if name in ("/", "per"):
            sign, closed = -1, False
        elif name in "()":
            bracketed = name == "("
        elif name.lower() in _POWER_WORDS:
            power = int(_POWER_WORDS[name.lower()][1:])
        elif name.startswith("^"):
            if len(latest) != 1 or not name[1:].removeprefix("-").isdecimal():
                return None
            (unit, exponent), latest = next(iter(latest.items())), {}
            exponents[unit] += exponent * (int(name[1:]) - 1)
        elif unit is not None and not (closed and not bracketed):
            factors = _PRODUCTS.get(unit, {unit: 1})
            latest = {factor: sign * power * exponent for factor, exponent in factors.items()}
            for factor, exponent in latest.items():
                exponents[factor] = exponents.get(factor, 0) + exponent
            power, closed = 1, sign < 0
        elif name != "*":
            return None
    return exponents if power == 1 and all(exponents.values()) else None


def _spelled_product(exponents: dict[str, int]) -> str:
    """Return the spelling of factor -> exponent, such as ``kg m/s``."""
    powers = {sign: [] for sign in (1, -1)}
    for unit, exponent in sorted(exponents.items()):
        sign = 1 if exponent > 0 or max(exponents.values()) < 0 else -1
        powers[sign].append(unit if sign * exponent == 1 else f"{unit}^{sign * exponent}")
    return "/".join([" ".join(powers[1]), *powers[-1]])


def _lower_case_singular(word: str) -> str:
    """Return a word in lower case, without a final s if it has more than three letters."""
    word = word.lower()
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def agree_or_missing(reference_unit: str, reply_unit: str) -> bool:
    """Return whether two units are equal or at least one of them is missing."""
    return not reference_unit or not reply_unit or reference_unit == reply_unit
