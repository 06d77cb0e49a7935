"""From a model's name to an endpoint on RunPod that answers: create, update, roll back, watch, delete.

It uses RunPod's REST API v2 as `runpod_api` describes it, and the doctor of `builder` to choose GPUs.
"""
