"""RunPod's control plane: its REST API v2 for serverless endpoints, over the emulator's endpoints and workers.

    routes ─▶ plane ─▶ rules, templates ─▶ catalog        what a request may say, and what it means
                │
                └────▶ deployment ─▶ core.endpoint        an endpoint's releases; its fleet replaces stale workers
                             │
                             └─────▶ container, logs      how a worker starts, and what it and its host log

`runpod_api/openapi.json` is the specification: bodies and parameters are checked against it, and `rules`, `templates`,
`catalog`, `logs` and `billing` do what its texts say.
"""
