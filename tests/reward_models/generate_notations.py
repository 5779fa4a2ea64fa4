"""Write the generated rows of ``notations.jsonl``: random answers, spelled by sympy.

    python tests/reward_models/generate_notations.py > rows.jsonl

Every right reply is the reference in another spelling; every wrong reply is another value, which
sympy has compared with the reference. No verifier of this project takes part.
"""

import json
import random
import sys
from collections.abc import Iterator

import sympy as sp

X, Y = sp.symbols("x y")
SENTENCES = ["{}", "The answer is {}.", "So we get {}", "\\boxed{{{}}}", "<answer>{}</answer>"]


def dollars(text: str) -> str:
    return f"${text}$"


def spellings_of_rational(value: sp.Rational, rng: random.Random) -> list[str]:
    """Spellings of one number: plain, LaTeX, decimal, mixed, scientific, with separators."""
    sign, size = ("-" if value < 0 else ""), abs(value)
    texts = [dollars(sp.latex(value)), str(value)]
    if value.q == 1:
        texts += [f"{int(value):,}", f"{value}.0", f"{sign}{int(size):,}".replace(",", "{,}")]
    else:
        texts += [f"{sign}\\dfrac{{{size.p}}}{{{size.q}}}", f"{2 * value.p}/{2 * value.q}"]
        whole, rest = divmod(size.p, size.q)
        if whole:
            texts += [
                f"{sign}{whole}\\frac{{{rest}}}{{{size.q}}}",
                f"{sign}{whole} {rest}/{size.q}",
            ]
    if set(sp.factorint(value.q)) <= {2, 5}:
        texts.append(decimal(value))
        texts.append(f"{decimal(value * 1000)}e-3")
        texts.append(f"{decimal(value / 100)} \\times 10^{{2}}")
    if value < 0:
        texts = [text.replace("-", rng.choice("-\N{MINUS SIGN}"), 1) for text in texts]
    return texts


def decimal(value: sp.Rational) -> str:
    """Exact decimal digits of a rational whose denominator has only factors 2 and 5."""
    places = max(sp.multiplicity(2, value.q), sp.multiplicity(5, value.q))
    digits = str(abs(value.p) * 10**places // value.q).zfill(places + 1)
    text = f"{digits[:-places]}.{digits[-places:]}" if places else digits
    return ("-" if value < 0 else "") + text


def numbers(rng: random.Random, how_many: int) -> Iterator[dict]:
    for _ in range(how_many):
        q = rng.choice([1, 1, 2, 3, 4, 7, 8, 10, 100])
        value = sp.Rational(rng.randint(-9999, 9999) or 1, q)
        others = [-value, value + 1, value * 10, value + sp.Rational(1, value.q), 1 / value]
        reference = rng.choice(spellings_of_rational(value, rng))
        other = rng.choice([v for v in others if v != value])
        yield row("number", reference, rng.choice(spellings_of_rational(value, rng)), True, rng)
        yield row("number", reference, rng.choice(spellings_of_rational(other, rng)), False, rng)


def polynomial(rng: random.Random) -> sp.Expr:
    roots = [rng.randint(-5, 5) for _ in range(rng.randint(2, 3))]
    return rng.randint(1, 4) * sp.prod(X - r for r in roots) + rng.randint(0, 3) * Y


def surd(rng: random.Random) -> sp.Expr:
    a, b = rng.randint(-9, 9), rng.choice([-3, -1, 1, 2, 5])
    return (a + b * sp.sqrt(rng.choice([2, 3, 5, 8, 12, 18]))) / rng.randint(1, 6)


def fraction(rng: random.Random) -> sp.Expr:
    return (rng.randint(1, 5) * X + rng.randint(-5, 5)) / (X**2 + rng.randint(1, 5)) + rng.randint(
        1, 3
    )


def forms(expression: sp.Expr) -> list[sp.Expr]:
    return [expression, sp.expand(expression), sp.factor(expression), sp.together(expression)]


def spell(expression: sp.Basic, rng: random.Random) -> str:
    return dollars(sp.latex(expression)) if rng.random() < 0.6 else str(expression)


def expressions(rng: random.Random, how_many: int) -> Iterator[dict]:
    for _ in range(how_many):
        value = rng.choice([polynomial, surd, fraction])(rng)
        other = rng.choice([value + 1, -value, value.subs({X: X + 1}) - 2, 2 * value + 1])
        if sp.simplify(other - value) == 0:
            other = value + 3
        reference = sp.latex(rng.choice(forms(value)))
        yield row("math", reference, spell(rng.choice(forms(value)), rng), True, rng)
        yield row("math", reference, spell(rng.choice(forms(other)), rng), False, rng)


def equations(rng: random.Random, how_many: int) -> Iterator[dict]:
    """Lines and circles; the same one times a constant, or another one."""
    for _ in range(how_many):
        a, b, c = rng.randint(1, 9), rng.choice([-7, -2, 1, 3, 8]), rng.randint(-9, 9)
        power = rng.choice([1, 2])
        left = a * X**power + b * Y**power
        k = rng.choice([-3, -1, 2, 5])
        right = (
            (sp.latex(k * left), str(-k * c))
            if rng.random() < 0.5
            else (sp.latex(k * left + k * c), "0")
        )
        wrong = rng.choice([left + X + c, left + c + 1, left - 2 * b * Y**power + c])
        reference = f"{sp.latex(left + c)} = 0"
        yield row("math", reference, dollars(" = ".join(right)), True, rng)
        yield row("math", reference, dollars(f"{sp.latex(wrong)} = 0"), False, rng)


def collections(rng: random.Random, how_many: int) -> Iterator[dict]:
    """Sets in another order, tuples and intervals in the same, matrices entry by entry."""
    for _ in range(how_many):
        items = [sp.Rational(n, 2) for n in rng.sample(range(-20, 20), 3)]
        mixed = rng.sample(items, 3)
        other = [*items[:2], items[2] + 20]
        texts = [[sp.latex(v) for v in values] for values in (items, mixed, other)]
        braces = [f"\\left\\{{{', '.join(text)}\\right\\}}" for text in texts]
        yield row("math", braces[0], dollars(braces[1]), True, rng)
        yield row("math", braces[0], dollars(braces[2]), False, rng)
        tuples = [f"\\left({', '.join(text)}\\right)" for text in texts]
        backwards = f"({', '.join(texts[0][::-1])})"
        yield row("math", tuples[0], str(tuple(items)), True, rng)
        yield row("math", tuples[0], backwards, False, rng)
        low, high = sorted(items[:2])
        interval = sp.Interval(low, high, rng.random() < 0.5, rng.random() < 0.5)
        wrong = sp.Interval(low, high + 1, interval.left_open, interval.right_open)
        yield row("math", sp.latex(interval), dollars(sp.latex(interval)), True, rng)
        yield row("math", sp.latex(interval), dollars(sp.latex(wrong)), False, rng)
        matrix = sp.Matrix(2, 2, [*items, 1])
        yield row("math", sp.latex(matrix), dollars(sp.latex(matrix)), True, rng)
        turned = matrix.T if matrix != matrix.T else matrix + sp.eye(2)
        yield row("math", sp.latex(matrix), dollars(sp.latex(turned)), False, rng)


def row(kind: str, reference: str, reply: str, right: bool, rng: random.Random) -> dict:
    sentence = rng.choice(SENTENCES).format(reply)
    return {
        "kind": kind,
        "reference": reference,
        "reply": sentence,
        "right": right,
        "source": "generated",
    }


def main() -> None:
    rng = random.Random(16)
    makers = [(numbers, 60), (expressions, 50), (equations, 25), (collections, 8)]
    for make, how_many in makers:
        for found in make(rng, how_many):
            sys.stdout.write(json.dumps(found, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
