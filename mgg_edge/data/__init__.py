"""Files shipped with the package: the default bundle."""
