"""Runs the PTX that nvcc and Triton emit on a CPU; threads are elements of NumPy arrays. A tool of the tests.

`cuda.Library` is a backend: the host code of csrc/cuda on a stub of CUDA's runtime (`cudart.cpp`), its kernels' PTX
interpreted. `triton_driver.TritonLibrary` is one, too: fastsam/ops/triton.py and Triton's own launcher on a stub of the
driver (`libcuda.cpp`). What both do with launches is in `backend`, what the tests give them and compare in `buckets`.

`parse` takes the text apart, `translate` makes a Python function of each basic block, `arithmetic` says what
instructions compute, `grid` runs a launch, `races` finds accesses that nothing puts in order. Written from the PTX ISA
manual, for what fastsam's kernels need: everything else raises `translate.Unknown`.

Watched in every launch: that each access lies in memory which the operation was given, is aligned, and may be written;
that shared memory, parameters and the kernels' tables are not read before they were written, and shared memory is not
touched by two threads without a barrier; that all threads meet at barriers and the launch ends; that tickets are back
at zero. With a seed blocks come in any order, and warps take turns at random at every meeting, branch and ticket; with
a log accesses to global memory are looked through for races.

Executed, with nvcc 13.0, Triton 3.9 and no option: all 242 CUDA kernels for compute_90 in 546 configurations (a kernel
in a test), 87 % of their instructions, 189 million elements compared; 66 Triton kernels for sm_90 in 92 configurations,
89 %, 22 million elements. `pytest -s` prints these lines. What changed lines the checks noticed is in tests/mutate.md.

Not modelled: ptxas and what it makes of the PTX; the memory model between blocks beyond barriers, tickets and the order
in which blocks run, so that a missing fence may go unseen; caches, registers, clusters, asynchronous copies; time;
payloads and signs of NaN; the last bits of an approximate reciprocal.
"""
