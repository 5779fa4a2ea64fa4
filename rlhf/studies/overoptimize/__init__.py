"""Study of reward overoptimization: the gold score by distance from the initial policy."""
