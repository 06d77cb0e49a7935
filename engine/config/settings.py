"""The worker's own settings: declared once here, read once. What `vllm serve` takes is in `engine.config.vllm_flags`.

`make docs` makes the READMEs' table (`tools.settings_table`) and RunPod Hub's form (`tools.runpod_hub`) from these
declarations.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    SecretStr,
    ValidationError,
    WithJsonSchema,
)

from engine.config import environment
from engine.config.environment import BAKED_SETTINGS_FILE, NOT_GIVEN, Variable
from engine.errors import ConfigurationError


def _split(value: Any) -> Any:
    return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value


_Route = Annotated[str, Field(pattern="^/")]


# A path says what it leads to; whether that is there is found out where it is read.
_File = Annotated[Path, WithJsonSchema({"type": "string", "format": "file-path"})]
_Directory = Annotated[Path, WithJsonSchema({"type": "string", "format": "directory-path"})]


class Settings(BaseModel):
    """What the worker itself can be told; each field's name in capitals is its variable."""

    model_config = ConfigDict(extra="ignore", frozen=True, hide_input_in_errors=True, protected_namespaces=())

    max_concurrency: PositiveInt | Literal["auto"] = Field(
        "auto", description="Most jobs that a worker runs at once; `auto` is what vLLM can run (`max_num_seqs`)."
    )
    batch_interval_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        20,
        description="Least time between two batches of a stream, in milliseconds; longer while more than three streams "
        "run. The first batch never waits.",
    )
    drain_timeout_s: float = Field(
        25, ge=0, description="Seconds that running jobs may go on when the worker is told to stop."
    )
    delivery_timeout_s: float = Field(
        600,
        gt=0,
        description="Seconds from a job's start until its outputs are no longer delivered: the endpoint's execution "
        "timeout.",
    )
    execution_timeout_s: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Seconds that a job may run before it is ended with an error; without it, the platform's own "
        "execution timeout alone ends a job.",
    )
    engine_stall_timeout_s: float = Field(
        120, gt=0, description="Seconds without a step, while requests run, after which the engine counts as dead."
    )
    allowed_routes: Annotated[frozenset[_Route], BeforeValidator(_split)] = Field(
        frozenset(),
        examples=["/metrics", "/sleep,/wake_up"],
        description="More of vLLM's routes that a job may call, beside those that serve a request.",
    )
    log_job_inputs: bool = Field(default=False, description="Log the input of each job.")
    vllm_config_file: _File | None = Field(
        None, description="YAML file of vLLM's flags, as `vllm serve --config` takes it."
    )
    vllm_extra_args: str | None = Field(
        None,
        examples=["--max-num-seqs 64"],
        description="More of vLLM's flags, as on a command line; they win over all others.",
    )
    baked_model_dir: _Directory = Field(
        Path("/workspace/vllm/phi-4-bnb-4bit"), description="Where the image holds its model, if it holds one."
    )
    baked_settings_file: _File = Field(
        BAKED_SETTINGS_FILE, description="JSON object of variables that the image was built with; the environment wins."
    )
    network_volume: _Directory = Field(
        Path("/runpod-volume"),
        description="Where the platform mounts a network volume; models are downloaded to its `models`.",
    )
    hf_token: SecretStr | None = Field(None, description="Token for gated or private models of the hub.")

    runpod_webhook_get_job: SecretStr | None = Field(
        None,
        description="Where jobs are taken from. Set by the platform; its presence tells that this is the platform.",
    )

    @property
    def on_platform(self) -> bool:
        """Whether a platform's queue is to be polled."""
        return self.runpod_webhook_get_job is not None

    @classmethod
    def read(cls, given: Mapping[str, Variable] | None = None) -> Self:
        """The settings that the variables give: this process's, without others.

        Raises:
            ConfigurationError: a value is not allowed; one line for each names the variable, the value and what is.
        """
        given = environment.read() if given is None else given
        values = {name.lower(): variable.value for name, variable in given.items() if variable.value not in NOT_GIVEN}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise ConfigurationError("\n".join(_faults(error, given))) from None


def allowed(name: str) -> str:
    """What the setting may be, in words; made from its declaration."""
    return _in_words(Settings.model_json_schema()["properties"][name])


def _faults(error: ValidationError, given: Mapping[str, Variable]) -> list[str]:
    names = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors())
    return [f"{name.upper()}={_shown(name, given)} is not allowed. Allowed: {allowed(name)}." for name in names]


def is_secret(name: str) -> bool:
    """Whether the setting's value is to be seen nowhere."""
    return "SecretStr" in str(Settings.model_fields[name].annotation)


def _shown(name: str, given: Mapping[str, Variable]) -> str:
    return "(hidden)" if is_secret(name) else repr(given[name.upper()].value)


def _in_words(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        options = [_in_words(option | {"examples": schema.get("examples", [])}) for option in schema["anyOf"]]
        return " or ".join(dict.fromkeys(option for option in options if option))
    if values := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return ", ".join(f"`{value}`" for value in values)
    if examples := schema.get("examples"):
        return "" if schema["type"] == "null" else "such as " + ", ".join(f"`{example}`" for example in examples)
    words = {
        "null": "",
        "boolean": "`true` or `false`",
        "integer": "a whole number" + _bounds(schema),
        "number": "a number" + _bounds(schema),
        "array": "routes, separated by commas",
        "password": "a secret",
        "file-path": "a file",
        "directory-path": "a directory",
        "string": "text",
    }
    return words[schema.get("format", schema["type"])]


def _bounds(schema: dict[str, Any]) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[bound]:g}" for bound, word in words.items() if bound in schema)
