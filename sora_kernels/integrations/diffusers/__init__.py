"""diffusers' models through our operations. One file plans for one family of models and imports nothing of the others.

Such a file has three functions: `plan(model, how)`, `example(model)` and `sample(model, steps, inputs, kwargs)`;
`diffusers.wan` says what they are. It may have CONSTANTS, the names of inputs for which the host has no gradients.
Source of all: diffusers 0.40 to 0.42.
"""

CLASSES = {  # file -> the classes that it plans for
    "cogvideox": ("CogVideoXTransformer3DModel",),
    "cosmos": ("CosmosTransformer3DModel",),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel", "HunyuanVideoFramepackTransformer3DModel", "HunyuanVideo15Transformer3DModel",
    ),
    "latte": ("LatteTransformer3DModel",),
    "ltx": ("LTXVideoTransformer3DModel",),
    "ltx2": ("LTX2VideoTransformer3DModel",),
    "mochi": ("MochiTransformer3DModel",),
    "vaes": (
        "AutoencoderKLCogVideoX", "AutoencoderKLHunyuanVideo", "AutoencoderKLHunyuanVideo15",
        "AutoencoderKLLTXVideo", "AutoencoderKLMochi",
    ),
    "wan": (
        "WanTransformer3DModel", "WanVACETransformer3DModel", "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel", "SkyReelsV2Transformer3DModel",
    ),
    "wan_vae": ("AutoencoderKLWan",),
}  # fmt: skip
