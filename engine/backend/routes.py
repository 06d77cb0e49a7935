"""The routes of vLLM's app that clients may call, by job or by HTTP: those that serve a request, no administration.

Sleeping, LoRA loading, profiling, scaling, aborting other requests, metrics and the docs are blocked unless
`ALLOWED_ROUTES` opens them. So are routes that do half of a request (a prompt rendered, tokens in and out), and those
whose responses depend on which worker answers. For routes that the model or this vLLM does not have, vLLM returns 404.
One route is the worker's own: `/cold_start` returns how long each phase of its start took.
"""

from __future__ import annotations

# Routes that are open to a WebSocket, where the worker serves HTTP.
WEBSOCKET = frozenset({"/v1/realtime"})
# Routes without a request body.
GET_ONLY = frozenset({"/cold_start", "/health", "/tokenizer_info", "/v1/models", "/version"})
# Routes that take a form with a file, not JSON.
FORMS = frozenset({"/v1/audio/transcriptions", "/v1/audio/translations"})
SERVING = frozenset(
    {
        "/classify",
        "/cohere/v2/chat",
        "/cold_start",
        "/detokenize",
        "/generative_scoring",
        "/health",
        "/pooling",
        "/rerank",
        "/score",
        "/tokenize",
        "/tokenizer_info",
        "/v1/audio/transcriptions",
        "/v1/audio/translations",
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/embeddings",
        "/v1/messages",
        "/v1/messages/count_tokens",
        "/v1/models",
        "/v1/rerank",
        "/v1/responses",
        "/v1/score",
        "/v2/embed",
        "/v2/rerank",
        "/version",
    }
)
# Those that start a request in the engine, where it needs room.
GENERATING = SERVING - GET_ONLY - {"/detokenize", "/tokenize", "/v1/messages/count_tokens"} | WEBSOCKET
