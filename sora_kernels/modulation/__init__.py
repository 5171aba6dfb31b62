"""adaLN modulation: `norm_modulate`, `gate_residual`, `gate_residual_norm_modulate`."""

from .op import gate_residual, gate_residual_norm_modulate, norm_modulate

__all__ = ["gate_residual", "gate_residual_norm_modulate", "norm_modulate"]
