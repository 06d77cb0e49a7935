"""The platform's side: its client, the job loop, admission, and the delivery of outputs and results."""
