"""Reads the complete configuration and checks it before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from engine.backend import startup_plan, vllm_args
from engine.backend.configuration import Configuration
from engine.config import environment
from engine.config.environment import Variable
from engine.config.settings import Settings
from engine.errors import ConfigurationError
from engine.startup import model_resolver


def read(variables: Mapping[str, Variable] | None = None) -> Configuration:
    """Return the configuration from variables and files, checked as far as possible without the model's files.

    This imports vLLM.

    Args:
        variables: by their upper-case names; those of this process by default.

    Raises:
        ConfigurationError: values are not allowed; a line for each.
    """
    variables = environment.read() if variables is None else variables
    settings = Settings.read(variables)
    flags = vllm_args.flags()
    flags.load(variables, [name.upper() for name in Settings.model_fields])
    vllm_args.limit_graphs(flags, settings.max_concurrency)
    startup_plan.enable(flags)
    if (engines := flags.value("data_parallel_size")) is not None and engines > 1:
        # vLLM supports it, but when one engine dies, it ends the requests of the others as if they were complete.
        raise ConfigurationError(
            f"DATA_PARALLEL_SIZE is {engines}, but a worker runs one engine: remove it and let the endpoint run more "
            "workers. TENSOR_PARALLEL_SIZE shards one engine over several GPUs"
        )
    model = model_resolver.choose(settings, flags)
    return Configuration(variables, settings, flags, model, vllm_args.parse(flags, model))


def check_with_model(configuration: Configuration) -> None:
    """Run the checks that vLLM makes before it loads the model, if the model is on this machine.

    Raises:
        ConfigurationError: vLLM does not accept the configuration.
    """
    environment.export_token(configuration.variables)
    model = configuration.model
    if model.to_download is None and Path(model.path).is_dir():
        model_resolver.enable_offline_mode(model, configuration.flags)
        _ = configuration.engine_config
