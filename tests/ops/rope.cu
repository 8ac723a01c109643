// ops/rope.cpp on CUDA: the same cases.
#include "rope.cpp"
