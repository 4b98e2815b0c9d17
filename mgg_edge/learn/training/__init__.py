"""Training of source models and of update rules."""
