"""Names, keys, messages and documentation have US spelling."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("rlhf", "envs", "reward_models", "benchmarks", "configs", "docs", "examples")
TYPES = {".py", ".md", ".yaml", ".html", ".css", ".js", ".toml"}
BRITISH = re.compile(
    r"[a-z]*(?:"
    r"(?:normal|optim|util|minim|maxim|organ|recogn|real|summar|token|serial|general|penal|standard"
    r"|initial|synchron|random|quant|regular|special|visual|parametr|memor|final|equal)"
    r"is(?:e[drs]?|ing|ation)"
    r"|(?:behavi|col|fav|hon|lab|neighb|flav|hum)our"
    r"|(?:label|model|cancel|travel|signal|marshal|level|channel|total)l(?:ed|ing)"
    r"|analys(?:e[drs]?|ing)\b|cent(?:re|red|ring)\b|catalogue|\blearnt\b|\bgrey\b|licence"
    r"|judgement|artefact"
    r")[a-z]*",
    re.IGNORECASE,
)
# Files with old names, with names of Python, and with names of Label Studio.
OTHERS = {
    "rlhf/runs/renamed.py",
    "rlhf/serving/scheduler.py",
    "rlhf/web/security.py",
    "rlhf/labeling/exchange/label_studio.py",
}


def test_british_spelling_is_not_used():
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "pyproject.toml"]
    files += [path for name in FOLDERS for path in (ROOT / name).rglob("*") if path.suffix in TYPES]
    found = {}
    for path in files:
        name = path.relative_to(ROOT).as_posix()
        words = set(map(str.lower, BRITISH.findall(path.read_text(encoding="utf-8"))))
        if name not in OTHERS and words:
            found[name] = words
    assert found == {}
