"""Our operations inside other libraries' models: `patch_model`, `unpatch_model`, `patched`, `verify_patch`.

Doors that a library itself holds open are modules of their own, imported by name, and the library with them when they
are called: comfy_kitchen, comfyui, diffusers_attention, lightx2v, ltx_core, sglang, yunchang.
"""

from .patch import patch_model, patched, unpatch_model
from .report import Report, Step
from .verify import Check, Verification, verify_patch

__all__ = ["Check", "Report", "Step", "Verification", "patch_model", "patched", "unpatch_model", "verify_patch"]
