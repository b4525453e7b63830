"""Socket types of our own, and what all nodes share."""

from comfy_api.latest import io

CATEGORY = "attention distillation"
# Folders of the node library, by task.
REFERENCE = f"{CATEGORY}/reference"
GUIDE = f"{CATEGORY}/guide"
TEXTURE_TOOLS = f"{CATEGORY}/texture tools"
COLOUR_AND_DETAIL = f"{CATEGORY}/colour and detail"

ADReference = io.Custom("AD_REFERENCE")
ADRegions = io.Custom("AD_REGIONS")
ADWindows = io.Custom("AD_WINDOWS")
