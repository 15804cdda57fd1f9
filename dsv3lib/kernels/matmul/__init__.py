"""Matrix products: FP8 block-scaled GEMM, grouped GEMM for the experts, their plans and slices."""
