"""One job: its input, the in-process call of vLLM's app, and its outputs."""
