"""The worker's own settings, declared here only. The flags of `vllm serve` are in `engine.config.vllm_flags`.

`make docs` makes the READMEs' table (`tools.settings_table`) and RunPod Hub's form (`tools.runpod_hub`) from these
declarations.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    WithJsonSchema,
)

from engine.config import environment
from engine.config.environment import BAKED_SETTINGS_FILE, NULL_WORDS, Variable
from engine.config.redaction import MASK, redacted
from engine.errors import ConfigurationError


def _split(value: Any) -> Any:
    """Return the items of a JSON list, or of a text with commas."""
    if not isinstance(value, str):
        return value
    if value.startswith("["):
        with suppress(ValueError):
            return json.loads(value)
    return [name.strip() for name in value.split(",") if name.strip()]


_Route = Annotated[str, Field(pattern=r"^/\S*$")]
# The schema says what kind of path it is. Whether it exists is checked where it is read.
_File = Annotated[Path, WithJsonSchema({"type": "string", "format": "file-path"})]
_Directory = Annotated[Path, WithJsonSchema({"type": "string", "format": "directory-path"})]

# Read only where the worker serves HTTP: elsewhere, such common variables have another meaning.
SERVER_SETTINGS = {"port", "port_health", "health_check_path", "listen_host"}


# Without one of these, there is no bucket.
_BUCKET = ("bucket_endpoint_url", "bucket_name", "bucket_access_key_id", "bucket_secret_access_key")


class Settings(BaseModel):
    """The worker's own settings; the variable of a field is its name in upper case."""

    model_config = ConfigDict(
        extra="ignore", frozen=True, hide_input_in_errors=True, allow_inf_nan=False, protected_namespaces=()
    )

    max_concurrency: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        "auto", description="Maximum jobs that a worker runs at once; `auto` is vLLM's own limit (`max_num_seqs`)."
    )
    batch_interval_ms: Annotated[int, Field(ge=0, le=10_000)] | Literal["auto"] = Field(
        "auto",
        description="Minimum time between two batches of a stream, in milliseconds; 0 delivers each event as it comes. "
        "`auto` is 20 to 50 ms, and more while the worker's event loop is overloaded. The first batch is never "
        "delayed.",
    )
    drain_timeout_s: float = Field(
        25, ge=0, description="Graceful shutdown timeout in seconds: how long running jobs may continue after SIGTERM."
    )
    delivery_timeout_s: float = Field(
        600,
        gt=0,
        description="Delivery timeout in seconds, from a job's start: failed deliveries are retried until then. Set it "
        "to the endpoint's execution timeout.",
    )
    spirit_request_timeout_s: float = Field(
        170,
        gt=0,
        description="Spirit: seconds after which a sync or proxied request ends with an error, and its stream in "
        "order; the platform cuts it off at 180 s.",
    )
    execution_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Execution timeout of a job in seconds, after which it ends with an error. If not set, only the "
        "platform's own timeout applies.",
    )
    warm_up: bool = Field(
        default=False,
        description="Run a short request before the first job is taken. For FlashBoot, which then freezes a worker "
        "that has served one; it lengthens a cold start by this request.",
    )
    engine_stall_timeout_s: float = Field(
        120, gt=0, description="Seconds without an engine step, while requests run, until the engine counts as dead."
    )
    allowed_routes: Annotated[frozenset[_Route], BeforeValidator(_split)] = Field(
        frozenset(),
        examples=["/metrics", "/sleep,/wake_up"],
        description="Additional vLLM routes that clients may call (comma-separated).",
    )
    log_job_inputs: bool = Field(default=False, description="Log the input of each job.")
    log_format: Literal["text", "json"] = Field(
        "text", description="Format of the log while the worker serves; `json` makes each line an object, also vLLM's."
    )
    price_per_second: float | None = Field(
        None,
        ge=0,
        description="Price of a second of the worker, in any currency. The log, the metrics and, on request, a job's "
        "output then say what each job cost.",
    )
    otel_exporter_otlp_endpoint: str | None = Field(
        None,
        examples=["http://collector:4318"],
        description="Collector that traces, metrics and logs are sent to by OTLP; OpenTelemetry's other variables are "
        "read too ([telemetry](docs/telemetry.md)). If not set, nothing is sent.",
    )
    vllm_config_file: _File | None = Field(
        None, description="YAML file of vLLM's flags, in the format of `vllm serve --config`."
    )
    vllm_extra_args: str | None = Field(
        None,
        examples=["--max-num-seqs 64"],
        description="Additional vLLM flags, written as on a command line; they override all others.",
    )
    baked_model_dir: _Directory = Field(
        Path("/workspace/vllm/phi-4-bnb-4bit"), description="Directory of the model in the image, if it has one."
    )
    baked_settings_file: _File = Field(
        BAKED_SETTINGS_FILE,
        description="JSON object of variables that were set when the image was built; the environment overrides them.",
    )
    network_volume: _Directory = Field(
        Path("/runpod-volume"),
        description="Mount point of the network volume; models are downloaded to its directory `models`.",
    )
    compile_cache_dir: _Directory | None = Field(
        None,
        description="Directory of what vLLM and its libraries compile; in the image `/workspace/vllm/compiled`, "
        "elsewhere `~/.cache/vllm-serverless/compiled`. What is new there is also packed into one file on the network "
        "volume, for other workers.",
    )
    hf_token: SecretStr | None = Field(None, description="Hugging Face token, for gated or private models.")

    bucket_endpoint_url: Annotated[str, Field(pattern=r"^https?://[^\s/?#@]+/?$")] | None = Field(
        None,
        examples=["https://s3.us-west-2.amazonaws.com"],
        description="URL of an S3 API, for results that are larger than the platform accepts: their jobs yield a link. "
        "With `BUCKET_NAME.` before the host, requests go there. Needs the next three settings too.",
    )
    bucket_name: str | None = Field(None, examples=["my-results"], description="Name of the bucket.")
    bucket_access_key_id: SecretStr | None = Field(None, description="Id of a key that may write and read there.")
    bucket_secret_access_key: SecretStr | None = Field(None, description="The key.")
    bucket_region: str | None = Field(
        None,
        examples=["us-west-2"],
        description="Region that requests are signed for. Default: the one in the URL, else `us-east-1`.",
    )
    bucket_link_expires_s: int = Field(
        24 * 60 * 60, ge=1, le=7 * 24 * 60 * 60, description="How long a link works, in seconds; 7 days at most."
    )

    platform: Literal["auto", "runpod", "spirit"] = Field(
        "auto",
        description="Platform that the worker takes jobs from: RunPod (its SDK's queue) or Spirit (spirit-gpu's "
        "agent). `auto`: RunPod if `RUNPOD_WEBHOOK_GET_JOB` is set, else Spirit if `EASE_AGENT_URL` is set, else none.",
    )
    runpod_webhook_get_job: SecretStr | None = Field(
        None,
        description="RunPod: URL that jobs are taken from. Set by the platform; when present, the worker polls the "
        "queue.",
    )
    ease_agent_url: str | None = Field(
        None,
        examples=["http://localhost:8087"],
        description="Spirit: URL of the agent beside the worker; `http://localhost:8087` with `PLATFORM=spirit`.",
    )

    endpoint_type: Literal["auto", "queue", "load_balancer"] = Field(
        "auto",
        description="Kind of RunPod endpoint: `queue` (the worker takes jobs) or `load_balancer` (it serves HTTP). "
        "`auto`: `load_balancer` if RunPod has set `RUNPOD_ENDPOINT_ID` and `RUNPOD_POD_ID`, but not "
        "`RUNPOD_WEBHOOK_GET_JOB`.",
    )
    port: Annotated[int, Field(ge=1, le=65535)] = Field(
        80, description="Load balancer: port of the HTTP server. Not read otherwise, nor are the next three."
    )
    port_health: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None, description="Load balancer: port of the health check; if not set, that of `PORT`."
    )
    health_check_path: _Route = Field(
        "/ping",
        examples=["/ping"],
        description="Load balancer: path of the health check: 200 ready, 204 loading, 503 draining or failed.",
    )
    listen_host: str = Field(
        "0.0.0.0",
        examples=["127.0.0.1"],
        description="Load balancer: address to listen on. The worker asks for no key, as the balancer checks it: on a "
        "machine without one, use `127.0.0.1`.",
    )
    runpod_endpoint_id: str | None = Field(
        None, examples=["x7k2p9qwerty12"], description="RunPod: id of the endpoint. Set by the platform."
    )
    runpod_pod_id: str | None = Field(
        None, examples=["a1b2c3d4e5f6g7"], description="RunPod: id of the worker. Set by the platform."
    )

    @property
    def queue(self) -> Literal["runpod", "spirit"] | None:
        """The platform whose queue the worker polls, if any."""
        if self.endpoint_type == "load_balancer":
            return None
        if self.platform == "spirit":
            return "spirit"
        if self.runpod_webhook_get_job is not None:
            return "runpod"
        return "spirit" if self.platform == "auto" and self.ease_agent_url is not None else None

    @property
    def serves_http(self) -> bool:
        """Whether the worker is one of a load-balancing endpoint."""
        if self.endpoint_type != "auto":
            return self.endpoint_type == "load_balancer"
        on_runpod = self.runpod_endpoint_id is not None and self.runpod_pod_id is not None
        return on_runpod and self.platform != "spirit" and self.queue is None

    @property
    def on_platform(self) -> bool:
        """Whether the worker serves a platform's clients: it polls a queue, or serves HTTP."""
        return self.queue is not None or self.serves_http

    @classmethod
    def read(cls, variables: Mapping[str, Variable] | None = None) -> Self:
        """Return the settings that the variables give; by default, those of this process.

        Raises:
            ConfigurationError: values are not allowed; a line for each has the variable, the value and what is allowed.
        """
        variables = environment.read() if variables is None else variables
        values = {name.lower(): one.value for name, one in variables.items() if one.value not in NULL_WORDS}
        others = {name: value for name, value in values.items() if name not in SERVER_SETTINGS}
        try:
            settings = cls.model_validate(others)
            if settings.serves_http:
                if settings.platform == "spirit":
                    raise ConfigurationError("ENDPOINT_TYPE=load_balancer is RunPod's: it cannot be set on Spirit")
                settings = cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError("\n".join(_validation_errors(error, variables))) from None
        given = [name for name in _BUCKET if getattr(settings, name) is not None]
        if given and (missing := ", ".join(name.upper() for name in _BUCKET if name not in given)):
            value = _quote(given[0], variables)
            raise ConfigurationError(f"{given[0].upper()}={value} is not allowed. Allowed: together with {missing}.")
        return settings


def allowed(name: str) -> str:
    """Describe the allowed values of a setting, from its declaration."""
    return _describe_schema(Settings.model_json_schema()["properties"][name])


def _validation_errors(error: ValidationError, variables: Mapping[str, Variable]) -> list[str]:
    names = dict.fromkeys(str(one["loc"][0]) for one in error.errors())
    return [f"{name.upper()}={_quote(name, variables)} is not allowed. Allowed: {allowed(name)}." for name in names]


def is_secret(name: str) -> bool:
    """Return whether the setting's value must not be shown."""
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def _quote(name: str, variables: Mapping[str, Variable]) -> str:
    return MASK if is_secret(name) else redacted(repr(variables[name.upper()].value))


def _describe_schema(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        options = [_describe_schema(option | {"examples": schema.get("examples", [])}) for option in schema["anyOf"]]
        return " or ".join(dict.fromkeys(option for option in options if option))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    if examples := schema.get("examples"):
        return "" if schema["type"] == "null" else "such as " + ", ".join(f"`{example}`" for example in examples)
    words = {
        "null": "",
        "boolean": "`true` or `false`",
        "integer": "integer" + _bounds(schema),
        "number": "number" + _bounds(schema),
        "array": "comma-separated routes",
        "password": "secret",
        "file-path": "file path",
        "directory-path": "directory path",
        "string": "text",
    }
    return words[schema.get("format", schema["type"])]


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"exclusiveMinimum": ">", "minimum": "≥", "maximum": "≤"}
    return ",".join(f" {sign} {schema[bound]:g}" for bound, sign in signs.items() if bound in schema)
