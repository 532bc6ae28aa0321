"""Forms of the operator `sample_axis`, each with its own derivatives.

All agree with `definition` in values, gradients and edges. They take one batch of maps `x`
`[B, H, W, C]`, offsets `[B, H, W, G]` in float32 or wider, and an axis, 'h' or 'w'. A form's
`forward` gives `[B, H, W, C]` in the dtype of `x`; its `backward` takes the cotangent of that too
and gives those of `x` and of the offsets, in their dtypes.
"""
