// ops/norm.cpp on CUDA: the same cases.
#include "norm.cpp"
