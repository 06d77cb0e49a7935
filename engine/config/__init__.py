"""What the worker is configured with: settings, vLLM's flags, and the environment that both come from."""
