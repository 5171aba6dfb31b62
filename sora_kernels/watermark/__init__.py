from .op import embed_watermark

__all__ = ["embed_watermark"]
