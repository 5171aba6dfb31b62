"""What keeps a generator honest, offline: which prompts it takes, and what its files say of themselves.

policy          rules in YAML for prompts, applied before anything is computed
filters         of frames, for classifiers of somebody's own
normalise       the readings of a prompt that they are applied to
credentials     a signed record in every file of what made it, from what; and what such a record is worth
verdict         that worth, of what c2pa finds
certificates    who signs
watermark       a mark in the pixels, for when the record is gone
shading         another in the noise that a clip is drawn from
classifier      of a checkpoint's own clips by their looks, to be fitted, where neither record nor mark is left
convnet         the same by a small network
limits          what a request may ask for and take, and where files are written
redteam         attacks on all of this, counted
store           the records of what was signed here, by the identity of its mark
"""
