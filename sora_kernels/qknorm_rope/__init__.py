from .op import qk_norm_rope

__all__ = ["qk_norm_rope"]
