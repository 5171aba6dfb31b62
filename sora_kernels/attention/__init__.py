from .op import spacetime_attention
from .plan import AttentionPlan, attention_plan

__all__ = ["AttentionPlan", "attention_plan", "spacetime_attention"]
