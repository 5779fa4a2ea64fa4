"""Write a page for every online algorithm to docs/algorithms/, from the registry and the code.

    python -m benchmarks.algorithm_pages

A page contains the equation, its source, the default settings, the code, and a learning curve. The
curve shows the numbers that `benchmarks.algorithm_curves` stored. tests/algorithms/test_pages.py
checks that the pages are up to date.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from benchmarks.algorithm_curves import CURVES, ECHO
from rlhf.algorithms import advantages, kl, losses
from rlhf.algorithms.algorithm import Algorithm
from rlhf.algorithms.registry import ALGORITHMS
from rlhf.algorithms.settings import Settings
from rlhf.common.files import read_json, write_text
from rlhf.config.help import sections_of
from rlhf.reports.charts import Chart, Series, standalone_chart_svg
from rlhf.stats import interval

FOLDER = CURVES.parent
_COMPONENT_MODULES = (advantages, kl, losses)
"""Modules whose import registers the functions that the pages show."""
_METRIC_NAMES = {"reward/mean": "score", "rollout/cost": "cost"}
_END_STEPS = 5
"""Number of last steps over which the end of a curve is averaged."""

_PAGE = """\
# {name}

<!-- Written by `python -m benchmarks.algorithm_pages`. Edit the registry or the code instead. -->

{title}: {summary}.

```yaml
output_dir: runs/{slug}
model: {{path: smollm2-135m-instruct}}
env: {{id: text/Echo-v0}}
```

```
rlhf {name} --config config.yaml
```

## Equation

```text
{equation}
```

[The overview](../algorithms.md#the-table) explains the symbols.

* Papers: {paper}.
* Source of the equation: {equation_source}.

| property | |
|-|-|
| critic | {critic} |
| groups of episodes with the same start state | {groups} |
| KL to the reference | {kl} |
| unbiased gradient | {unbiased} |
| difference from the exact policy gradient | {bias} |
| policy to which it converges on a one-turn problem | {fixed_point} |

## Default settings

The table omits the settings of `rlhf {name}` that have no effect with these defaults.

| setting | value | meaning |
|-|-|-|
{settings}

## Code

The advantage estimator is `{advantage}`, in `rlhf/algorithms/advantages.py`:

```py
{advantage_code}
```

The loss is `{loss}`, in `rlhf/algorithms/losses.py`:

```py
{loss_code}
```
{kl_code}
## Learning curve

{curve_text}

![Learning curve of {name}]({slug}.svg)

| metric | first step | mean of the last {end_steps} steps |
|-|-|-|
{curve_rows}

```
python -m benchmarks.algorithm_curves runs/curves
```
"""


def file_name(algorithm: str) -> str:
    """Return the name of the files of an algorithm, without a suffix."""
    return algorithm.replace("++", "-plus-plus")


def page(algorithm: Algorithm, stored: dict[str, Any]) -> str:
    """Return the Markdown page of an algorithm.

    Args:
        algorithm: Row of the registry.
        stored: Content of curves.json.
    """
    result = stored["algorithms"][algorithm.name]
    return _PAGE.format(
        name=algorithm.name,
        slug=file_name(algorithm.name),
        title=algorithm.title,
        summary=algorithm.summary,
        equation=algorithm.equation,
        paper=algorithm.paper,
        equation_source=algorithm.equation_source,
        critic="yes" if algorithm.needs_critic else "no",
        groups=f"of {algorithm.settings.group_size}" if algorithm.needs_groups else "no",
        kl=_kl_phrase(algorithm),
        unbiased="yes" if algorithm.unbiased else "no",
        bias=_in_table(algorithm.bias),
        fixed_point=_in_table(algorithm.fixed_point),
        settings="\n".join(_setting_rows(algorithm)),
        advantage=algorithm.settings.advantage,
        advantage_code=_code(algorithm.advantage_estimator.function),
        loss=algorithm.loss,
        loss_code=_code(algorithm.policy_loss.function),
        kl_code=_kl_code(algorithm),
        curve_text=_curve_text(stored, result),
        curve_rows="\n".join(_curve_rows(result)),
        end_steps=_END_STEPS,
    )


def curve_image(algorithm: Algorithm, stored: dict[str, Any]) -> str:
    """Return the learning curve of an algorithm as SVG, with 95% intervals over seeds."""
    result = stored["algorithms"][algorithm.name]
    curves = result["curves"]
    lines = []
    for metric, color in (("reward/mean", "c1"), ("rollout/cost", "c6")):
        if metric in _shown(curves):
            columns = zip(*curves[metric], strict=True)
            points = [interval(column, bounds=_bounds(result, metric)) for column in columns]
            steps = range(1, len(points) + 1)
            lines.append(Series.from_estimates(_METRIC_NAMES[metric], steps, points, color))
    names = " and ".join(line.name for line in lines)
    return standalone_chart_svg(
        Chart(f"{algorithm.name}: mean {names} of a batch", lines, y_label=names)
    )


def _kl_phrase(algorithm: Algorithm) -> str:
    if algorithm.policy_loss.reference:
        return "in the policy loss"
    if not algorithm.needs_reference:
        return "none"
    place = "subtracted from the reward" if algorithm.kl_in_reward else "added to the loss"
    return f"{place}, estimator {algorithm.settings.kl_estimator}"


def _setting_rows(algorithm: Algorithm) -> Iterator[str]:
    """Yield a row of the table for each setting that has an effect."""
    (section,) = sections_of(Settings, {})
    meanings = {key.name: key.description for key in section.keys}
    for field in fields(Settings):
        if field.name in algorithm.settings_with_effect:
            value = getattr(algorithm.settings, field.name)
            yield f"| `{field.name}` | {value} | {_in_table(meanings[field.name])} |"


def _in_table(text: str) -> str:
    return text.replace("|", "\\|")


def _kl_code(algorithm: Algorithm) -> str:
    if algorithm.policy_loss.reference or not algorithm.needs_reference:
        return ""
    name = algorithm.settings.kl_estimator
    code = _code(getattr(kl, name))
    return f"\nThe KL estimator is `{name}`, in `rlhf/algorithms/kl.py`:\n\n```py\n{code}\n```\n"


def _code(function: Callable[..., Any]) -> str:
    """Return the source of a function and of the private functions that it calls."""
    module = next(m for m in _COMPONENT_MODULES if m.__name__ == function.__module__)
    sources, names, done = [], [function.__name__], set()
    while names:
        name = names.pop(0)
        if name in done:
            continue
        done.add(name)
        tree = ast.parse(inspect.getsource(getattr(module, name))).body[0]
        assert isinstance(tree, ast.FunctionDef)
        called = [
            node.func.id
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)
        ]
        names += [name for name in called if _is_shown(getattr(module, name, None), name)]
        sources.append(_without_docstring(inspect.getsource(getattr(module, name)), tree))
    return "\n\n".join(sources)


def _is_shown(called: Any, name: str) -> bool:
    """Return whether a called object is a private function that is part of the algorithm."""
    private = name.startswith("_") and not name.endswith("_metrics")
    return private and inspect.isfunction(called)


def _without_docstring(source: str, tree: ast.FunctionDef) -> str:
    """Return the source of a function from ``def`` on, with the first line of its docstring."""
    lines = source.splitlines()
    docstring = tree.body[0]
    if ast.get_docstring(tree) and docstring.end_lineno is not None:
        first = lines[docstring.lineno - 1]
        closed = first if first.count('"""') == 2 else first + '"""'
        lines[docstring.lineno - 1 : docstring.end_lineno] = [closed]
    return "\n".join(lines[tree.lineno - 1 :])


def _curve_text(stored: dict[str, Any], result: dict[str, Any]) -> str:
    settings, seeds = stored["settings"], len(result["curves"]["reward/mean"])
    return (
        f"The curve was measured with a model of 0.1 million parameters on `{result['env']}`. The "
        "model was first fine-tuned on noisy demonstrations and then trained with the settings "
        f"above, {settings['episodes_per_step']} episodes per step, a learning rate of "
        f"{settings['optimizer']['learning_rate']:g} and {seeds} seeds. The line shows the mean "
        "over seeds, and the band shows its 95% interval. A comparison of algorithms needs several "
        "tasks; see [the leaderboard](../leaderboard.md)."
    )


def _shown(curves: dict[str, Any]) -> list[str]:
    """Return the metrics of the curves that are not 0 in every step."""
    return [name for name, rows in curves.items() if any(value for row in rows for value in row)]


def _bounds(result: dict[str, Any], metric: str) -> tuple[float, float] | None:
    """Return the smallest and the largest value of a metric, if they are known."""
    return (0.0, 1.0) if (result["env"], metric) == (ECHO, "reward/mean") else None


def _curve_rows(result: dict[str, Any]) -> Iterator[str]:
    curves = result["curves"]
    for metric in _shown(curves):
        rows = curves[metric]
        bounds = _bounds(result, metric)
        start = interval([row[0] for row in rows], bounds=bounds)
        last = [sum(row[-_END_STEPS:]) / _END_STEPS for row in rows]
        end = interval(last, bounds=bounds)
        cells = [
            f"{x.value:.3f} [{x.low:.3f}, {x.high:.3f}]" if x.known else f"{x.value:.3f}"
            for x in (start, end)
        ]
        yield f"| `{metric}` | {' | '.join(cells)} |"


def files(stored: dict[str, Any]) -> dict[Path, str]:
    """Return path -> content of every page and curve."""
    content = {}
    for name, algorithm in ALGORITHMS.items():
        content[FOLDER / f"{file_name(name)}.md"] = page(algorithm, stored)
        content[FOLDER / f"{file_name(name)}.svg"] = curve_image(algorithm, stored)
    return content


def main() -> None:
    """Write the pages and the curves."""
    for path, text in files(read_json(CURVES)).items():
        write_text(path, text)
        print(path)


if __name__ == "__main__":
    main()
