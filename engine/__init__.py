"""The worker: from a job of the platform's queue to vLLM and back, one file a step.

`loop` takes jobs, as many as `admission` allows; `payloads` reads a job, `dispatch` calls vLLM's own OpenAI app with
it, `batching` gathers what comes back into job outputs, `jobs` is the way through the three; `delivery` brings them to
the platform. `server` holds vLLM, `platform` the SDK; `lifecycle` loads the one and runs the loop on the other.
"""
