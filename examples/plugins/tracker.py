"""A tracker that writes the metrics of every step to a CSV file."""

import csv

from rlhf.plugins import Tracker, register_tracker

plugin_api = 1


@register_tracker("csv")
def open_csv(directory, config, step):
    """Append lines (step, key, value) to metrics.csv of the run."""
    file = (directory / "metrics.csv").open("a", newline="")
    writer = csv.writer(file)

    def log(step, metrics):
        writer.writerows((step, key, value) for key, value in metrics.items())
        file.flush()

    return Tracker(log, file.close)
