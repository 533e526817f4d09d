"""Faster ways to compute what the plain network computes. A first reading may skip this folder.

fused_linear     q, k, v as one product; gate, up as one
compiler         torch.compile and the settings that it needs
token_attention  the flash kernel for one new token a slot
foreach          copies of many tensors in one kernel launch

With `execution.fused = false` the first three are not used. All private interfaces of torch that the package uses are
used here, and the tests of each file fail when torch moves one of them.
"""
