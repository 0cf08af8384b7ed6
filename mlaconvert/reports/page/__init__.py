"""The HTML report of an evaluation: one file, nothing loaded from elsewhere."""
