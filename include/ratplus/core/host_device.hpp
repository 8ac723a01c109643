#pragma once
// RATPLUS_HD marks the functions that both the host and a CUDA device may call: patterns, cells, monoids, views.
// A host compiler sees nothing; nvcc sees the two annotations.

#if defined(__CUDACC__)
#define RATPLUS_HD __host__ __device__
#else
#define RATPLUS_HD
#endif
