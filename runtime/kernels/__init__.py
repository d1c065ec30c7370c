"""Kernels by operation: one file each, with the maths, a torch reference and, where there is one, a GPU version.

`table` says which implementation runs what on which machine; `python -m runtime.kernels` prints it.  `fp8_linear` and
`nvfp4_linear` are for few tokens, `fp8_quantize` and `nvfp4_quantize` make their inputs, `tiles` cuts the work.  `fp8_experts`
and `nvfp4_experts` are for any number of tokens, `slots` is what they share, `nvfp4_wide` multiplies where tokens are many,
`router` chooses.  `attention_decode` attends for one token per sequence, `gated_delta_step` and `mamba2_step` are recurrent
layers for one token.
`gated_delta` holds the recurrence of linear attention, `ssd` that of Mamba2; both run on any device that torch supports.
`gated_delta_fla` and `ssd_scan` are the same for many tokens on a GPU.
Only files with a Triton kernel import triton.
"""
