from .op import attention_backward, attention_forward, gate_heads, merge_attention, spacetime_attention
from .plan import AttentionPlan, attention_plan

__all__ = [
    "AttentionPlan",
    "attention_backward",
    "attention_forward",
    "attention_plan",
    "gate_heads",
    "merge_attention",
    "spacetime_attention",
]
