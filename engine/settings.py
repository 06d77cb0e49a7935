"""Every setting of the worker: declared once here, read once from the environment.

The README's table is made from these declarations (`python -m engine.settings README.md`).
"""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, PositiveInt, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from engine.errors import ConfigurationError


class Settings(BaseSettings):
    """What the worker can be told by environment variables; each field's name in capitals is its variable.

    The names are those that worker-vllm's users have, and vLLM's own.
    """

    model_config = SettingsConfigDict(
        env_ignore_empty=True, extra="ignore", frozen=True, hide_input_in_errors=True, protected_namespaces=()
    )

    model_name: str | None = Field(
        None,
        description="Hub id or directory of the model. Without it: the model in the image; off the platform, the tiny "
        "model.",
        examples=["Qwen/Qwen3-8B"],
    )
    model_revision: str | None = Field(None, description="Branch, tag or commit of the model on the hub.")
    tokenizer_name: str | None = Field(None, description="Hub id or directory of another tokenizer.")
    served_model_name: Annotated[list[str], NoDecode] = Field(
        [],
        description="Names that requests may call the model by, separated by commas; answers carry the first.",
    )
    max_model_len: str | None = Field(
        None,
        pattern=r"^(auto|-1|[1-9]\d*|\d+(\.\d+)?[kKmM])$",
        examples=["8192", "16k", "auto"],
        description="Most tokens of prompt and answer together; `auto` is what fits the memory.",
    )
    dtype: Literal["auto", "half", "float16", "bfloat16", "float", "float32"] | None = Field(
        None, description="Type of weights and activations."
    )
    quantization: str | None = Field(
        None,
        description="Quantization method; without it, what the model's config says.",
        examples=["awq", "bitsandbytes"],
    )
    load_format: str | None = Field(
        None, description="Format of the weights.", examples=["safetensors", "bitsandbytes"]
    )
    gpu_memory_utilization: float | None = Field(
        None, gt=0, le=1, description="Share of the GPU's memory that vLLM may take."
    )
    kv_cache_memory_bytes: str | None = Field(
        None,
        pattern=r"^\d+(\.\d+)?[kKmMgGtT]?$",
        examples=["2G", "500M"],
        description="Memory for the KV cache, in place of what GPU_MEMORY_UTILIZATION leaves. On a CPU: 1 GiB.",
    )
    tensor_parallel_size: PositiveInt | None = Field(None, description="GPUs that share the model.")
    enforce_eager: bool | None = Field(
        None, description="Skip compilation: slower tokens, faster start. Without it: off on a GPU, on on a CPU."
    )
    max_concurrency: PositiveInt | Literal["auto"] = Field(
        "auto", description="Most jobs that a worker runs at once; `auto` is what vLLM can run (`max_num_seqs`)."
    )
    batch_interval_ms: Annotated[int, Field(ge=0, le=10_000)] = Field(
        20,
        description="Least time between two batches of a stream, in milliseconds; longer while more than four streams "
        "run. The first batch never waits.",
    )
    drain_timeout_s: float = Field(
        25, ge=0, description="Seconds that running jobs may go on when the worker is told to stop."
    )
    job_timeout_s: float = Field(
        600, gt=0, description="Seconds that deliveries of a job are tried: the endpoint's execution timeout."
    )
    engine_stall_timeout_s: float = Field(
        120, gt=0, description="Seconds without a step, while requests run, after which the engine counts as dead."
    )
    baked_model_dir: Path = Field(
        Path("/workspace/vllm/phi-4-bnb-4bit"), description="Where the image holds its model, if it holds one."
    )
    hf_token: SecretStr | None = Field(None, description="Token for gated or private models of the hub.")

    runpod_webhook_get_job: SecretStr | None = Field(
        None,
        description="Where jobs are taken from. Set by the platform; its presence tells that this is the platform.",
    )

    @field_validator("served_model_name", mode="before")
    @classmethod
    def _split_names(cls, value: Any) -> Any:
        return [name.strip() for name in value.split(",") if name.strip()] if isinstance(value, str) else value

    @property
    def on_platform(self) -> bool:
        """Whether a platform's queue is to be polled."""
        return self.runpod_webhook_get_job is not None

    @classmethod
    def read(cls) -> Self:
        """The settings of this process's environment.

        Raises:
            ConfigurationError: a value is not allowed; one line for each names the variable, the value and what is.
        """
        try:
            return cls()
        except ValidationError as error:
            raise ConfigurationError("\n".join(_faults(error))) from None


def allowed(name: str) -> str:
    """What the setting may be, in words; made from its declaration."""
    return _in_words(Settings.model_json_schema()["properties"][name])


def markdown_table() -> str:
    """All settings as a Markdown table: variable, default, what is allowed, meaning."""
    rows = ["| Variable | Default | Allowed | Meaning |", "| --- | --- | --- | --- |"]
    for name, field in Settings.model_fields.items():
        default = "" if field.default in (None, []) else f"`{field.default}`"
        rows.append(f"| `{name.upper()}` | {default} | {allowed(name)} | {field.description} |")
    return "\n".join(rows)


def _faults(error: ValidationError) -> list[str]:
    names = dict.fromkeys(str(fault["loc"][0]) for fault in error.errors())
    return [f"{name.upper()}={_shown(name)} is not allowed. Allowed: {allowed(name)}." for name in names]


def _shown(name: str) -> str:
    if "SecretStr" in str(Settings.model_fields[name].annotation):
        return "(hidden)"
    return repr(next((value for key, value in os.environ.items() if key.lower() == name), ""))


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
        "array": "names, separated by commas",
        "password": "a secret",
        "path": "a directory",
        "string": "text",
    }
    return words[schema.get("format", schema["type"])]


def _bounds(schema: dict[str, Any]) -> str:
    words = {"exclusiveMinimum": "above", "minimum": "from", "maximum": "to", "exclusiveMaximum": "below"}
    return "".join(f" {word} {schema[bound]:g}" for bound, word in words.items() if bound in schema)


def _write_table(readme: Path) -> None:
    """Put the table between the README's `settings` marks."""
    text = readme.read_text(encoding="utf-8")
    marks = re.compile(r"(<!-- settings -->\n).*?(<!-- /settings -->)", re.DOTALL)
    if not marks.search(text):
        raise SystemExit(f"{readme} has no <!-- settings --> marks")
    readme.write_text(marks.sub(lambda match: f"{match[1]}{markdown_table()}\n{match[2]}", text), encoding="utf-8")


if __name__ == "__main__":
    _write_table(Path(sys.argv[1]))
