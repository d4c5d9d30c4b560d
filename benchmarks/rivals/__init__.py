"""Published methods in plain PyTorch, as a reader of their papers writes them: what ours is timed
against."""
