"""Measurements that anyone can repeat: this worker beside vLLM's own server and beside worker-vllm."""
