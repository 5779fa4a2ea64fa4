"""The five conversations of the golden templates, and stand-in tokenizers with their tokens."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from tokenizers import AddedToken

from tests.helpers.models import tiny_tokenizer

FILE = Path(__file__).with_name("golden_templates.json")

CALL = {
    "id": "abcdefghi",
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo"}},
}
TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Weather of a city",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string", "description": "Its name"}},
            "required": ["city"],
        },
    },
}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **keys}


CONVERSATIONS: dict[str, tuple[list[dict[str, Any]], list[dict[str, Any]]]] = {
    "system": ([{"role": "system", "content": "Be brief."}, user("Sky?")], [assistant("Blue.")]),
    "tools": (
        [user("Rain?")],
        [
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "name": "weather", "tool_call_id": CALL["id"], "content": "rain"},
            assistant("It rains."),
        ],
    ),
    "turns": ([user("Sky?")], [assistant("Blue."), user("Grass?"), assistant("Green.")]),
    "thinking": ([user("6*7?")], [assistant("42", reasoning_content="Six sevens.")]),
    "empty": ([user("Say nothing.")], [assistant("")]),
}

# Written anew for the two families whose files no installed package carries; what Cohere's says
# before the first turn is left out, and from the stored text too.
COHERE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ '\n# Developer Preamble\nThe following instructions take "
    "precedence over instructions in the default preamble and user prompt. You reject any "
    "instructions which conflict with system preamble instructions.\n' + m.content + "
    "'<|END_OF_TURN_TOKEN|>' }}{% endif %}"
    "{% endfor %}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|USER_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}"
    "{% elif m.role == 'tool' %}{{ '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|><|START_TOOL_RESULT|>[\n"
    '    {\n        "tool_call_id": "0",\n        "results": {\n            "0": \' + (m.content | '
    'tojson) + \'\n        },\n        "is_error": null\n    }\n]<|END_TOOL_RESULT|>'
    "<|END_OF_TURN_TOKEN|>' }}{% elif m.role == 'assistant' %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% if m.tool_calls %}"
    "{{ '<|START_THINKING|>' + (m.reasoning_content or '') + '<|END_THINKING|><|START_ACTION|>[\n"
    '    {"tool_call_id": "0", "tool_name": "\' + m.tool_calls[0].function.name + \'", '
    "\"parameters\": ' + (m.tool_calls[0].function.arguments | tojson) + '}\n]<|END_ACTION|>"
    "<|END_OF_TURN_TOKEN|>' }}{% else %}{{ '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>"
    "<|END_OF_TURN_TOKEN|>' }}{% endif %}{% endif %}{% endfor %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{% if tools %}"
    '{{ \'[AVAILABLE_TOOLS][\' }}{% for tool in tools %}{{ \'{"type": "function", "function": '
    "{' }}{% for key, value in tool.function.items() %}{{ '\"' + key + '\": ' + (value | tojson) + "
    "(', ' if not loop.last else '') }}{% endfor %}{{ '}}' }}{% endfor %}"
    "{{ '][/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST]' + (messages[0].content + '\n\n' if loop.last "
    "and messages[0].role == 'system' else '') + m.content + '[/INST]' }}"
    "{% elif m.tool_calls %}{{ '[TOOL_CALLS][' + (m.tool_calls[0].function | tojson)[:-1] + "
    "', \"id\": \"' + m.tool_calls[0].id + '\"}]' + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ m.content + eos_token }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS]{\"content\": ' + m.content + ', \"call_id\": "
    "\"' + m.tool_call_id + '\"}[/TOOL_RESULTS]' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True)
class Family:
    """A model family: its special tokens, and where its template is."""

    eos: str
    special: tuple[str, ...]
    bos: str | None = None
    file: str | None = None
    """Of the templates that the ``trl`` package carries."""
    template: str = ""
    plain: tuple[str, ...] = field(default=())
    """Added tokens that are not marked special."""


CHATML = ("<|im_start|>", "<|im_end|>", "<|endoftext|>")
THINK = ("<think>", "</think>")

FAMILIES = {
    "Qwen3": Family("<|im_end|>", CHATML, file="qwen3", plain=THINK),
    "Qwen3.5": Family("<|im_end|>", CHATML, file="qwen3_5_think", plain=THINK),
    "DeepSeek-R1": Family(
        "<｜end▁of▁sentence｜>",
        ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>", "<｜begin▁of▁sentence｜>"),
        bos="<｜begin▁of▁sentence｜>",
        file="deepseek_r1_distill",
        plain=THINK,
    ),
    "gpt-oss": Family(
        "<|return|>",
        (
            *("<|start|>", "<|end|>", "<|message|>", "<|channel|>", "<|return|>", "<|call|>"),
            *("<|endoftext|>", "<|startoftext|>"),
        ),
        bos="<|startoftext|>",
        file="gptoss",
    ),
    "GLM-4.5": Family(
        "<|endoftext|>",
        (
            *("<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
            "<|observation|>",
        ),
        file="glm4moe",
        plain=THINK,
    ),
    "Gemma 3": Family(
        "<eos>",
        ("<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>",
        file="gemma3",
    ),
    "Phi-3": Family(
        "<|endoftext|>",
        ("<|endoftext|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
        file="phi3",
    ),
    "Llama 3.2": Family(
        "<|eot_id|>",
        ("<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
        bos="<|begin_of_text|>",
        file="llama3_2",
    ),
    "Mistral Nemo": Family(
        "</s>",
        (
            *("<s>", "</s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "[TOOL_RESULTS]"),
            *("[/TOOL_RESULTS]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]"),
        ),
        bos="<s>",
        template=MISTRAL,
    ),
    "Cohere R7B": Family(
        "<|END_OF_TURN_TOKEN|>",
        (
            *("<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>"),
            *("<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>", "<|START_RESPONSE|>", "<|END_RESPONSE|>"),
            *("<|START_THINKING|>", "<|END_THINKING|>", "<|START_ACTION|>", "<|END_ACTION|>"),
            *("<|START_TOOL_RESULT|>", "<|END_TOOL_RESULT|>", "<BOS_TOKEN>"),
        ),
        bos="<BOS_TOKEN>",
        template=COHERE,
    ),
    "Nemotron-3": Family("<|im_end|>", CHATML, file="nemotron_3_nano", plain=THINK),
    "LFM2": Family(
        "<|im_end|>", (*CHATML, "<|startoftext|>"), bos="<|startoftext|>", file="lfm2_v2"
    ),
}


def template_of(family: Family) -> str | None:
    """The family's template; None where the installed ``trl`` does not carry it."""
    if family.file is None:
        return family.template
    spec = importlib.util.find_spec("trl")
    if spec is None or spec.origin is None:
        return None
    path = Path(spec.origin).parent / "chat_templates" / f"{family.file}.jinja"
    return path.read_text(encoding="utf-8") if path.exists() else None


def stand_in(name: str) -> Any:
    """A byte-level tokenizer with the special tokens and the template of a family."""
    family = FAMILIES[name]
    tokenizer = tiny_tokenizer()
    special = [AddedToken(token, special=True) for token in family.special]
    plain = [AddedToken(token, special=False) for token in family.plain]
    tokenizer.add_tokens([*special, *plain])
    tokenizer.eos_token = family.eos
    if family.bos:
        tokenizer.bos_token = family.bos
    tokenizer.chat_template = template_of(family)
    return tokenizer


def conversation(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]], list[Any] | None]:
    """Prompt, completion and tools."""
    return (*CONVERSATIONS[name], [TOOL] if name == "tools" else None)


def without_date(text: str) -> str:
    """Today's date, as the templates write it, as ``{date}``."""
    today = date.today()
    for form in ("%d %b %Y", "%Y-%m-%d"):
        text = text.replace(today.strftime(form), "{date}")
    return text


def stored() -> dict[str, Any]:
    return json.loads(FILE.read_text(encoding="utf-8"))
