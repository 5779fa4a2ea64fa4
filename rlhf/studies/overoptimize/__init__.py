"""Study of reward overoptimization: gold score against distance from the initial policy."""
