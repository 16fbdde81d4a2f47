"""Modules that no rule serves: measured where the graph uses their parameters, run once more, or sample by sample."""
