#pragma once
// The CUDA front door: the contracts, and every operation of them on a device. For translation units that nvcc
// compiles.

#if !defined(__CUDACC__)
#error "ratplus/cuda.cuh is for files compiled by nvcc (*.cu); host programs include ratplus/ratplus.hpp"
#endif

#include "ratplus/backend/cuda/attend.cuh"
#include "ratplus/backend/cuda/cache.cuh"
#include "ratplus/backend/cuda/context.cuh"
#include "ratplus/backend/cuda/core.cuh"
#include "ratplus/backend/cuda/embed.cuh"
#include "ratplus/backend/cuda/gate.cuh"
#include "ratplus/backend/cuda/gelu.cuh"
#include "ratplus/backend/cuda/loss.cuh"
#include "ratplus/backend/cuda/matmul.cuh"
#include "ratplus/backend/cuda/memory.cuh"
#include "ratplus/backend/cuda/norm.cuh"
#include "ratplus/backend/cuda/norm_matmul.cuh"
#include "ratplus/backend/cuda/sample.cuh"
#include "ratplus/backend/cuda/scan.cuh"
#include "ratplus/backend/cuda/scan_attend.cuh"
#include "ratplus/backend/cuda/step.cuh"
