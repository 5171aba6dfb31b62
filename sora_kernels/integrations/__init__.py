"""Our operations inside other libraries' models: `patch_model`, `unpatch_model`, `patched`, `verify_patch`."""

from .patch import Report, Step, patch_model, patched, unpatch_model
from .verify import Check, Verification, verify_patch

__all__ = ["Check", "Report", "Step", "Verification", "patch_model", "patched", "unpatch_model", "verify_patch"]
