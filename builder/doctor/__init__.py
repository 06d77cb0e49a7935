"""Says before a deployment whether a model fits a GPU, and what the worker would do with it."""
