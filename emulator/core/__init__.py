"""The platform's state: jobs, queue, fleet, autoscaler and faults."""
