"""Labelled pictures and streams for demonstration, training and evaluation: numpy and Pillow alone, no PyTorch."""
