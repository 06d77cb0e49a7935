"""The configuration: the worker's settings, vLLM's flags, and the environment that both come from."""
