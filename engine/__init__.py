"""The worker: from a job of the platform's queue to vLLM and back, one file a step.

`payloads` reads a job, `dispatch` calls vLLM's own OpenAI app with it, `batching` gathers what comes back into job
outputs, `jobs` is the way through the three. `server` holds vLLM, `lifecycle` loads it once per worker.
"""
