"""What outlives a run: states and records."""
