"""Reproducible measurements of this worker, compared with vLLM's own server and with worker-vllm."""
