"""The worker: from a job of the platform's queue to vLLM and back.

    worker ─▶ queue ─▶ jobs ─▶ backend ─▶ config        startup: what happens before the first take

`queue.job_loop` takes jobs, as many as `queue.admission` allows; `jobs.inputs` reads a job, `jobs.asgi` calls vLLM's
own OpenAI app with it, `jobs.event_batcher` gathers what comes back into job outputs, `jobs.pipeline` joins the three;
`queue.delivery` posts them to the platform. `backend.vllm_engine` holds vLLM, `queue.runpod_client` the SDK; `worker`
loads the one and runs the loop on the other.
"""
