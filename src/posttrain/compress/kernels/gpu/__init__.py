"""Kernels for packed weights on a GPU, in Triton: the products of `uniform`, `table`, `trits` and `vectors` once more.

The functions of those modules come here where their inputs are on a CUDA device. Every kernel reads the layout that is
stored, makes the values in registers and adds up in fp32; many rows of inputs are multiplied as dequantized values by
torch, whose matrix products use the tensor cores.

Modules whose names begin with an underscore need Triton to be imported (`pip install posttrain[triton]`; CUDA builds of
torch bring it along). Under Triton's interpreter (`TRITON_INTERPRET=1`, set before it is imported) they run on the CPU,
slowly, which is how they are tested.
"""
