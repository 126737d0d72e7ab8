"""What all Triton kernels share: what they can run, how they are described, and the list of them."""
