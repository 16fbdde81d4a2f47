"""The project's own studies. They are in the repository, not in the wheel: `python -m research.NAME` from its root."""
