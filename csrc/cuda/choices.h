// What of the CUDA kernels can be chosen when they are compiled: how they compute, never what, so that every choice
// gives the same bits. benchmarks/variants.py builds libraries with other choices and times them against this one;
// benchmarks/NOTES.md says what each is expected to gain.
#pragma once

// update_ and perturb_ load a tile anew as soon as it is stored, instead of all tiles after the last one is; perturb_
// loads its first tiles ahead of the scalars, and Adam in float32 has two tiles instead of one. A processor holds one
// block of these two fewer.
#ifndef FASTSAM_PREFETCH
#define FASTSAM_PREFETCH 0
#endif

// A chunk is divided among blocks only while each has this many KiB to read and write.
#ifndef FASTSAM_LEAST_PART
#define FASTSAM_LEAST_PART 0
#endif

// grad_norm's grid has no more blocks than a GPU holds at once, and each takes several chunks.
#ifndef FASTSAM_RESIDENT_NORM
#define FASTSAM_RESIDENT_NORM 0
#endif

// Tensors are loaded and stored plainly, as global memory, without the intrinsics, whose machine code says STRONG.
#ifndef FASTSAM_PLAIN_ACCESS
#define FASTSAM_PLAIN_ACCESS 0
#endif

// update_ begins with the last chunk instead of the first.
#ifndef FASTSAM_DESCENDING_UPDATE
#define FASTSAM_DESCENDING_UPDATE 0
#endif
