"""The base optimizers: which are fused and what kernels read of their groups; Lion; the step of those not fused."""
