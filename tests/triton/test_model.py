"""The model by its Triton kernels, forward and backward, against its references in fp64; packed equals alone."""
