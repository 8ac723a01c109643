// ops/memory.cpp on CUDA: the same cases.
#include "memory.cpp"
