"""No file that is read can run code: no pickle, no remote code, templates in a sandbox."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.reward_models.chat_template import TemplateRefused, render_chat
from tests.helpers.models import tiny_tokenizer

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "envs", "reward_models")
SOURCES = [path for name in PACKAGES for path in (ROOT / name).rglob("*.py")]
UNSAFE_LOADERS = {
    "pickle.load",
    "pickle.loads",
    "pickle.Unpickler",
    "marshal.load",
    "marshal.loads",
    "shelve.open",
    "dill.load",
    "joblib.load",
    "yaml.unsafe_load",
    "yaml.full_load",
    "torch.jit.load",
    "jinja2.Environment",
    "eval",
}


def calls() -> Iterator[tuple[str, ast.Call]]:
    """Yield every call in the package with the text of the function."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                yield f"{path.relative_to(ROOT)}: {ast.unparse(node.func)}", node


def keyword(call: ast.Call, name: str) -> str | None:
    return next((ast.unparse(k.value) for k in call.keywords if k.arg == name), None)


def test_no_call_can_unpickle():
    names = [name for name, _ in calls()]
    assert len(names) > 10_000
    loads = [(name, call) for name, call in calls() if name.endswith(": torch.load")]
    assert loads
    assert [name for name, call in loads if keyword(call, "weights_only") != "True"] == []
    assert [name for name in names if name.partition(": ")[2] in UNSAFE_LOADERS] == []
    assert [name for name, call in calls() if keyword(call, "allow_pickle") == "True"] == []
    assert [n for n, c in calls() if keyword(c, "trust_remote_code") not in (None, "False")] == []


def test_yaml_is_loaded_with_a_safe_loader():
    loads = [call for name, call in calls() if name.endswith(": yaml.load")]
    loaders = {keyword(call, "Loader") for call in loads}
    assert all((loader and "_Loader" in loader) or "Safe" in str(loader) for loader in loaders)


def test_templates_cannot_reach_python():
    tokenizer = tiny_tokenizer()
    for template in (
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.__class__.__init__.__globals__ }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% for i in range(10 ** 9) %}{% endfor %}",
        "{{ messages.append(1) }}",
    ):
        tokenizer.chat_template = template
        with pytest.raises(TemplateRefused):
            render_chat(tokenizer, [{"role": "user", "content": "x"}])
