// ops/matmul.cpp on CUDA: the same cases.
#include "matmul.cpp"
