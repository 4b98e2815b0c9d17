"""The bundle file: read, verified, its graphs spliced with their weights."""
