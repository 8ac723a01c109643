// ops/core.cpp on CUDA: the same cases.
#include "core.cpp"
