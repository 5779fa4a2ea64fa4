"""Messages, and rows of preference data and demonstrations."""

import json


def system(text):
    return {"role": "system", "content": text}


def user(text, **more):
    return {"role": "user", "content": text, **more}


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def tool(text, **more):
    return {"role": "tool", "content": text, **more}


def bare(loaded):
    """The rows without their source, sorted."""
    rows = [{k: v for k, v in row.items() if k != "source"} for row in loaded.rows]
    return sorted(rows, key=lambda row: json.dumps(row, sort_keys=True))


def pair(prompt, chosen, rejected, **more):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    return {
        "prompt": prompt,
        "chosen": [assistant(chosen)],
        "rejected": [assistant(rejected)],
        **more,
    }


def sft(prompt, completion):
    prompt = [user(prompt)] if isinstance(prompt, str) else prompt
    completion = [assistant(completion)] if isinstance(completion, str) else completion
    return {"prompt": prompt, "completion": completion}


PKU = {
    "prompt": "Q",
    "response_0": "zero",
    "response_1": "one",
    "is_response_0_safe": False,
    "is_response_1_safe": True,
    "better_response_id": 0,
    "safer_response_id": 1,
}


NECTAR = {
    "prompt": "\n\nHuman: Q\n\nAssistant: ",
    "answers": [
        {"answer": "second", "model": "m", "rank": 2.0},
        {"answer": "first", "model": "n", "rank": 1.0},
        {"answer": "third", "model": "o", "rank": 3.0},
    ],
    "turns": 1,
}


OASST = [
    ("1", None, "prompter", "Q", None),
    ("2", "1", "assistant", "good", 0),
    ("3", "1", "assistant", "bad", 1),
    ("4", "2", "prompter", "more", None),
    ("5", "4", "assistant", "deep", None),
]


def oasst_rows():
    keys = ("message_id", "parent_id", "role", "text", "rank")
    return [dict(zip(keys, values, strict=True)) | {"lang": "en"} for values in OASST]
