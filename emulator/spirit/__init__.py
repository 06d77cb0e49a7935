"""Spirit (datastone.cn): what its serverless platform does differently from RunPod.

    clients ─▶ gateway, proxy ─▶ task_queue ◀─ agent ◀─ workers (one agent beside each)
                     ▲               │
                     └──── relay ────┘ answers of proxied requests, piece by piece

Workers, autoscaler, faults and page are those of `emulator.core` and `emulator.api`; `task` and `task_queue` only
decide.
Sources, by name below: "API.md" and "README.md" are those of `spirit-gpu` 0.1.0, which is "the SDK".
docs/decisions/0181-what-the-spirit-emulation-assumes.md lists the assumptions where they say nothing.
"""
