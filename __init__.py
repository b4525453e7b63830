"""Attention Distillation for ComfyUI: a picture takes on the style, look or texture of a reference image."""

from .nodes import AttentionDistillationExtension

WEB_DIRECTORY = "./web"
"""What ComfyUI serves to the browser: each node's help in docs/, and the colours of our sockets."""


async def comfy_entrypoint() -> AttentionDistillationExtension:
    """Called by ComfyUI once, when it loads the pack."""
    return AttentionDistillationExtension()
