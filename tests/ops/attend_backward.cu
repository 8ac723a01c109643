// ops/attend_backward.cpp on CUDA: the same cases.
#include "attend_backward.cpp"
