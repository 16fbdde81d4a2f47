"""The field's own test suites with our classes in the place of theirs. No file of theirs is copied."""
