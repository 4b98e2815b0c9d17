"""mgg-edge: label-free test-time adaptation of image classifiers with a learned optimiser."""

__version__ = "0.1.0"
