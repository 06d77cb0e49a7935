"""vLLM, which no other package imports: its arguments, engine, app and statistics."""
