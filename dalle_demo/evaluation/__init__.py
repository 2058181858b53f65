"""pictures -> figures: features, metrics on them, and attributes measured by program."""
