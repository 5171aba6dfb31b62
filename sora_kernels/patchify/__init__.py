from .op import final_layer, patch_embed3d, unpatchify3d, video_to_uint8

__all__ = ["final_layer", "patch_embed3d", "unpatchify3d", "video_to_uint8"]
