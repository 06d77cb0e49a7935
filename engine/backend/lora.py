"""LoRA adapters in directories that vLLM's resolvers search."""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Any


def accept_model_names(names: tuple[str, ...]) -> None:
    """Let vLLM's resolvers find adapters whose base model is any of the names of the served model.

    By itself vLLM compares an adapter's base model with the directory of the served model only.
    """
    from vllm.lora.resolver import LoRAResolver, LoRAResolverRegistry

    class AliasLoRAResolver(LoRAResolver):  # type: ignore[misc]  # vLLM is not typed for --strict
        def __init__(self, resolver: Any) -> None:
            self.resolver = resolver

        async def resolve_lora(self, base_model_name: str, lora_name: str) -> Any:
            path = PurePosixPath(lora_name)
            if path.is_absolute() or ".." in path.parts:
                return None  # The name comes from a job and is joined to the directory of adapters: it must stay there.
            for name in dict.fromkeys((base_model_name, *names)):
                if (found := await self.resolver.resolve_lora(name, lora_name)) is not None:
                    return found
            return None

    resolvers = LoRAResolverRegistry.resolvers
    resolvers.update({name: AliasLoRAResolver(resolver) for name, resolver in resolvers.items()})
