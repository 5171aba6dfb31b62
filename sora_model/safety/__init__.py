"""What keeps a generator honest, offline: which prompts it takes.

policy          rules in YAML for prompts, applied before anything is computed
normalise       the readings of a prompt that they are applied to
"""
