"""Socket types of our own, and what all nodes share."""

from comfy_api.latest import io

CATEGORY = "attention distillation"
# Folders of the node library, by what an artist wants to do.
START_HERE = f"{CATEGORY}/start here"
TEXTURE_TOOLS = f"{CATEGORY}/texture tools"
COLOUR_AND_DETAIL = f"{CATEGORY}/colour and detail"
INSPECT = f"{CATEGORY}/inspect"
OTHER_SAMPLERS = f"{CATEGORY}/other samplers"

ADReference = io.Custom("AD_REFERENCE")
ADRegions = io.Custom("AD_REGIONS")
ADWindows = io.Custom("AD_WINDOWS")
