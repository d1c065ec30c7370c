"""Kernels by operation: one file each, with the maths, a torch reference and, where there is one, a GPU version.

`gated_delta` holds the recurrence of linear attention, `ssd` that of Mamba2.  Everything here runs on any device that torch
supports.
"""
