"""Where predictions go: lines, tables, annotated videos, the live page, metrics."""
