"""Measurements of speed, each with its goal beside the figure; run as `python -m benchmarks.NAME`."""
