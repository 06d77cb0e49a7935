"""Sends a file of requests in OpenAI's batch format through a queue endpoint, and writes OpenAI's output files.

A run can be killed at any time, and continues when the same command is started again.
"""
