"""Experiment trackers: they get what a run writes into its directory, while it runs or later.

    metrics.jsonl, samples/, config.yaml, summary.json ──Feed──► ExperimentTracker (TensorBoard, W&B, trackio, MLflow)

A `Feed` reads the directory and remembers how far it got. A tracker that cannot be reached therefore loses nothing. A
tracker's package is imported only when it is used.
"""
