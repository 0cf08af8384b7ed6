"""ComfyUI nodes that run models converted by mlaconvert, chunk by chunk through their small cache."""

from .nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
