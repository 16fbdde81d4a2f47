"""Which models and layers `PerSampleGradNorms` measures: one row a model, each against one backward pass a sample."""
