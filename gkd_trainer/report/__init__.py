"""Reports: the metrics that are logged, and completions as tables."""
