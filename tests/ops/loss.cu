// ops/loss.cpp on CUDA: the same cases.
#include "loss.cpp"
