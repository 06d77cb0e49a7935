"""RunPod's load-balancing endpoints: HTTP goes straight to a worker, without a queue.

    clients ─▶ proxy ─▶ endpoint (which worker?) ─▶ workers' PORT
                           ▲ health checks of workers' PORT_HEALTH

Source: docs.runpod.io, "Load balancing endpoints" and "Worker affinity". What they do not say is decision 0203.
"""
