"""A run from config to scores: checks, the loop, checkpoints, export, scores."""
