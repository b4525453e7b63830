"""The guidance loop: one guided step, and its place in ComfyUI's sampling loop."""
