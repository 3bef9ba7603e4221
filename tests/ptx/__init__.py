"""Runs the PTX that nvcc and Triton emit on a CPU; threads are elements of NumPy arrays. A tool of the tests.

`parse` takes the text apart, `translate` makes a Python function of each basic block, `arithmetic` says what
instructions compute, `grid` runs a launch and watches what it touches, `races` finds accesses that nothing puts in
order. `cuda.Library` is a backend: csrc/cuda's host code on `cudart.cpp`, its kernels interpreted. Written from the PTX
ISA manual, for what fastsam's kernels need: everything else raises `translate.Unknown`.

Not modelled: ptxas and what it makes of the PTX, the memory model between blocks beyond barriers, tickets and the order
in which blocks run, caches, registers, time; payloads and signs of NaN.
"""
