// ops/norm_matmul.cpp on CUDA: the same cases.
#include "norm_matmul.cpp"
