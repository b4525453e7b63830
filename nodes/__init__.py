"""The nodes: schema, validation, one call into the core."""

from comfy_api.latest import ComfyExtension, io

from . import adain, capture, example, guidance, inject, map, optimise, regions, tiling, vae_decoder, windows


class AttentionDistillationExtension(ComfyExtension):
    """Tells ComfyUI which nodes the pack has."""

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Each node module lists its own."""
        return [
            *capture.NODES,
            *guidance.NODES,
            *optimise.NODES,
            *adain.NODES,
            *regions.NODES,
            *windows.NODES,
            *inject.NODES,
            *map.NODES,
            *tiling.NODES,
            *vae_decoder.NODES,
            *example.NODES,
        ]
