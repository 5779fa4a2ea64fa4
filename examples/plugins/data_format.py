"""A data format: exams with a correct and several wrong answers."""

from rlhf.plugins import register_data_format

plugin_api = 1


@register_data_format("exam", columns=("task", "gold", "wrong"), kinds=("preference", "sft"))
def read_exam(row, kind):
    """Yield one demonstration, or a pair for each wrong answer."""
    if kind == "sft":
        yield {"prompt": row["task"], "completion": row["gold"]}
    else:
        for wrong in row["wrong"]:
            yield {"prompt": row["task"], "chosen": row["gold"], "rejected": wrong}
