"""Units, currencies and scale words that may follow a number."""

from __future__ import annotations

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
    "rad": "rad radian radians",
    "N": "N newton newtons",
    "J": "J joule joules",
    "W": "W watt watts",
    "V": "V volt volts",
    "Hz": "Hz hertz",
    "K": "K kelvin",
    "unit": "unit units",
}
_UNIT_BY_WORD = {
    word: unit for unit, spelled in _UNIT_SPELLINGS.items() for word in spelled.split()
}
_POWER_WORDS = {"square": "^2", "sq": "^2", "cubic": "^3", "cu": "^3"}

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
    "assume assuming imagine "
)
"""Words that are never units, because they change the value or begin another clause."""


def known_unit(word: str) -> str | None:
    """Return the canonical spelling of the unit ``word``, or None if it is not a known unit."""
    if word in _UNIT_BY_WORD:
        return _UNIT_BY_WORD[word]
    return None if len(word) == 1 else _UNIT_BY_WORD.get(word.lower())  # M is not a meter


def canonical_unit(names: list[str]) -> str:
    """Return the canonical spelling of a unit, for example ``m^2`` for ``square meters``.

    ``names`` are the words of the unit; a word can also be "/" or a power such as "^2". Unknown
    words are converted to lower case and to the singular.
    """
    if [word.lower() for word in names] == ["per", "cent"]:
        return PERCENT
    parts, power = [], ""
    for word in names:
        if word.lower() in _POWER_WORDS:
            power = _POWER_WORDS[word.lower()]
        elif word.startswith("^") and parts:
            parts[-1] += word
        elif word in ("/", "per"):
            parts.append("/")
        else:
            parts.append((known_unit(word) or _singular(word)) + power)
            power = ""
    return " ".join(parts).replace(" / ", "/").replace("mile/h", "mph")


def _singular(word: str) -> str:
    word = word.lower()
    return word[:-1] if word.endswith("s") and len(word) > 3 else word


def agree_or_missing(reference_unit: str, reply_unit: str) -> bool:
    """Return whether two units are equal or at least one of them is missing."""
    return not reference_unit or not reply_unit or reference_unit == reply_unit
