"""A node pack for ComfyUI; docs/serving.md says how it is installed.

ComfyUI loads this folder under a name of its own, hence the import from the installed package.
"""

from serving.comfyui.nodes import comfy_entrypoint

__all__ = ["comfy_entrypoint"]
