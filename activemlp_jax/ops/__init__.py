"""The operator `sample_axis` with its implementations, and faster implementations of plain layers.

Imports `utils`. All implementations of `sample_axis` agree with the definition, `reference.sample`,
in values, gradients and edge cases; `sample_axis.IMPLEMENTATIONS` lists them. Each has two
functions. `forward` takes a batch of maps `x` `[B, H, W, C]`, offsets `[B, H, W, G]` in float32 or
wider, and an axis, 'h' or 'w'; it returns `[B, H, W, C]` in the dtype of `x`. `backward` also takes
the gradient of that result; it returns the gradients of `x` and of the offsets, each in the dtype
of its array.
"""
