"""Which axis of a tensor is the samples', before and after a function: in what runs, and in what is traced."""
