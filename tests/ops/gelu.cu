// ops/gelu.cpp on CUDA: the same cases.
#include "gelu.cpp"
