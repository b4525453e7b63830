"""Attention Distillation for ComfyUI: a picture takes on the style, look or texture of a reference image."""

from .host_guard import HostError, check_host

check_host()
try:
    from .nodes import AttentionDistillationExtension
except (ImportError, AttributeError) as error:
    raise HostError(str(error)) from error

WEB_DIRECTORY = "./web"
"""What ComfyUI serves to the browser: each node's help in docs/, and the colours of our sockets."""


async def comfy_entrypoint() -> AttentionDistillationExtension:
    """Called by ComfyUI once, when it loads the pack."""
    return AttentionDistillationExtension()
