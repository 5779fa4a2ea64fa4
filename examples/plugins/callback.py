"""A callback that ends training when a metric reaches a value, and counts its calls."""

from rlhf.plugins import Callback, register_callback

plugin_api = 1


@register_callback("stop_at")
class StopAt(Callback):
    """End training after an evaluation in which ``metric`` is at least ``value``."""

    def __init__(self, metric="eval/return", value=1.0):
        self.metric, self.value, self.evaluations = metric, value, 0

    def on_evaluation(self, event):
        """Log the number of evaluations so far, also over a resumption."""
        self.evaluations += 1
        event.log({"callback/evaluations": self.evaluations})
        if event.metrics[self.metric] >= self.value:
            event.stop()

    def state_dict(self):
        return {"evaluations": self.evaluations}

    def load_state_dict(self, state):
        self.evaluations = state["evaluations"]
