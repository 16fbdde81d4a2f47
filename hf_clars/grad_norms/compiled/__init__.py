"""Models under `torch.compile`: norms that are a part of the compiled graph."""
