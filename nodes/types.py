"""Socket types of our own, and what all nodes share."""

from comfy_api.latest import io

CATEGORY = "attention distillation"

ADReference = io.Custom("AD_REFERENCE")
ADRegions = io.Custom("AD_REGIONS")
ADWindows = io.Custom("AD_WINDOWS")
