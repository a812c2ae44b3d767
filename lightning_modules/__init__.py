"""The model and one run of it. Entry points: train, evaluate."""
