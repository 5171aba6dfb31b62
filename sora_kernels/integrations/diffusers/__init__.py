"""diffusers' models through our operations. One file plans for one family of models and imports nothing of the others.

Such a file has three functions: `plan(model, how)`, `example(model)` and `sample(model, steps, inputs, kwargs)`;
`diffusers.wan` says what they are. `HOSTS` in `sora_kernels.integrations.patch` names its classes.
Source of all: diffusers 0.40 to 0.42.
"""
