from .op import causal_conv3d, downsample_conv3d, norm_silu, upsample_conv3d

__all__ = ["causal_conv3d", "downsample_conv3d", "norm_silu", "upsample_conv3d"]
