"""Predicts whether a model fits a GPU, and checks a deployment's settings, versions, disk and token."""
