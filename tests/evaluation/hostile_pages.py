"""Pages of runs whose texts and names try to run code or to deform the page."""

import json
from pathlib import Path

from rlhf.evaluation.pairs import write_pair_evaluation
from rlhf.reports import write_comparison_report, write_report
from rlhf.reward_models import PerConversationReward
from tests.evaluation import fake_pipeline as fake

ESC, RLO, ISOLATE = "\x1b", "\u202e", "\u2067"
HOSTILE = {
    "script": "</script><script>document.title='owned'</script>",
    "attribute": "\" onmouseover=\"document.title='owned'\" x='",
    "image": "<img src=x onerror=\"document.title='owned'\">",
    "link": "<a href=\"javascript:document.title='owned'\">click</a>",
    "unclosed": "<table><tr><td></div></main><!-- <textarea><style>*{display:none}",
    "section": '<section id="x"><h2>No such section</h2></header>',
    "bidi": f"{RLO}evil{ISOLATE}\u2066",
    "ansi": f"{ESC}[2J{ESC}[31mred{ESC}[0m",
    "osc": f"{ESC}]0;owned\x07{ESC}]8;;http://example.org\x07link\x9b31m",
    "return": "good\rBAD\b\b\b",
    "markdown": "a|b\n| c |`d`[e](javascript:f)![g](h)<b>*i*_j_",
    "formula": '=HYPERLINK("http://example.org","x")',
    "rich": "[bold red]x[/] [/nothing]",
    "surrogate": "\ud800 half",
    "separators": "a\u2028b\u2029c\x85d\x00e",
    "combining": "a" + "\u0335\u0489" * 300,
    "long": "W" * 5000,
}
EVERYTHING = "\n".join(HOSTILE.values())


def hostile_pipeline(root: Path) -> Path:
    """Write a pipeline whose replies, prompts, names of metrics and settings are hostile."""
    fake.write_pipeline(root)
    row = {"step": 1, "seed": 9, "score": 1.0}
    rows = [
        {**row, "split": split, "messages": fake.conversation(0, EVERYTHING)}
        for split in ("before", "after")
    ]
    (root / "dpo" / "samples.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    metrics = root / "ppo" / "metrics.jsonl"
    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    for number, line in enumerate(lines):
        line |= {f"reward/{text}": number + k / 9 for k, text in enumerate(HOSTILE.values())}
    metrics.write_text("\n".join(map(json.dumps, lines)) + "\n")
    machine = json.dumps({"command": ["rlhf", *HOSTILE.values()], "versions": {}})
    (root / "ppo" / "environment.json").write_text(machine)
    return root


def reward_report(root: Path) -> Path:
    name = HOSTILE["markdown"] + HOSTILE["script"]
    length = PerConversationReward(lambda c: float(len(c[-1]["content"])), name=name)
    rows = [
        {"prompt": f"{EVERYTHING} {i}?", "chosen": "yes " * (i % 7 + 1), "rejected": "no"}
        for i in range(40)
    ]
    write_pair_evaluation(length, rows, root, name="pairs")
    return root


def pages_of(tmp_path: Path) -> list[Path]:
    root = hostile_pipeline(tmp_path / "runs")
    return [
        write_report(root),
        write_comparison_report([root], tmp_path / "compare.html"),
        write_report(reward_report(tmp_path / "judged")),
    ]
