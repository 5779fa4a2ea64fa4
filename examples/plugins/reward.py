"""Two kinds of rewards: a function, and a class."""

from rlhf.plugins import register_reward

plugin_api = 1


@register_reward("brevity")
def brevity(conversations, *, limit: int = 20):
    """Score 1 if the completion has at most ``limit`` characters, else 0."""
    return [float(len(conversation[-1]["content"]) <= limit) for conversation in conversations]


@register_reward("keyword")
class Keyword:
    """Score the number of occurrences of a word, or None for an empty completion."""

    def __init__(self, word: str, ignore_case: bool = True) -> None:
        self.word, self.ignore_case = word, ignore_case

    def __call__(self, conversations):
        """Return one score for each conversation."""
        texts = [conversation[-1]["content"] for conversation in conversations]
        if self.ignore_case:
            return [t.lower().count(self.word.lower()) if t else None for t in texts]
        return [text.count(self.word) if text else None for text in texts]
