"""The serverless platform on one machine, for development and tests.

    clients ─▶ client_api, gateway ─▶ queue ◀─ worker_api ◀─ workers
                                        │                       ▲
                                    autoscaler ─▶ fleet ─▶ workers, launcher

`queue` and `autoscaler` decide and do nothing else: no I/O, no clock. `endpoint` holds one endpoint together, `server`
all of them. `faults` breaks what it is told to break.
"""
