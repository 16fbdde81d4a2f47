"""Measurements of hf_clars against other code. In the repository, not in the wheel."""
