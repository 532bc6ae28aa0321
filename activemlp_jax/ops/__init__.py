"""Forms of the operator `sample_axis`: one implementation per kind of platform.

All forms agree with the definition, `reference.sample`, in values, gradients and edge cases. A form
has two functions. `forward` takes a batch of maps `x` `[B, H, W, C]`, offsets `[B, H, W, G]` in
float32 or wider, and an axis, 'h' or 'w'; it returns `[B, H, W, C]` in the dtype of `x`. `backward`
also takes the cotangent of that result; it returns the cotangents of `x` and of the offsets, each
in the dtype of its array.
"""
