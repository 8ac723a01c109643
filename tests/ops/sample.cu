// ops/sample.cpp on CUDA: the same cases.
#include "sample.cpp"
