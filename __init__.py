"""Attention Distillation for ComfyUI: a picture takes on the style, look or texture of a reference image."""

from .nodes import AttentionDistillationExtension


async def comfy_entrypoint() -> AttentionDistillationExtension:
    """Called by ComfyUI once, when it loads the pack."""
    return AttentionDistillationExtension()
