from .op import final_layer, patch_embed3d, unpatchify3d

__all__ = ["final_layer", "patch_embed3d", "unpatchify3d"]
