"""From files that people have to batches that a model eats."""
