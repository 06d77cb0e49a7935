"""The times of each job and the counts of the worker; what a job cost; and their export by OpenTelemetry (OTLP)."""
