"""Our operations inside other libraries' models: `patch_model`, `unpatch_model`, `verify_patch`."""

from .patch import Check, Report, Step, Verification, patch_model, unpatch_model, verify_patch

__all__ = ["Check", "Report", "Step", "Verification", "patch_model", "unpatch_model", "verify_patch"]
