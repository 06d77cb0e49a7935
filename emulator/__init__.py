"""Emulator of the serverless platform on one machine, for development and tests.

    clients ─▶ api.client, api.openai_gateway ─▶ core.job_queue ◀─ api.worker ◀─ workers
                                                       │                           ▲
                                               core.autoscaler ─▶ core.fleet ─▶ core.process, core.launcher

That is RunPod's queue endpoints; `balancer` has its load-balancing endpoints, `control_plane` creates and deletes both
over RunPod's REST API, and `spirit` has what is Spirit's, over the same fleet.

`core.job_queue` and `core.autoscaler` only decide: no I/O and no clock of their own. `core.runpod_endpoint` combines
the parts of one endpoint, `app` serves all endpoints over HTTP. `core.faults` and `api.fault_middleware` inject faults
on demand.
"""
