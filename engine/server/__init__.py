"""The worker's HTTP server on a load-balancing endpoint: health check, routes, admission, drain."""
