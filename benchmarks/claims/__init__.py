"""The papers' claims at a scale that fits in an afternoon: `python -m benchmarks.claims NAME` (docs/results.md)."""
