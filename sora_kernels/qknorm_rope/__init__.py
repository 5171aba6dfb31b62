from .op import qk_norm_rope, qk_norm_stats

__all__ = ["qk_norm_rope", "qk_norm_stats"]
