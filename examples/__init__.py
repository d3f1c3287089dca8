"""Generative models and large outputs, each a script: ``python -m examples.segmentation``."""
