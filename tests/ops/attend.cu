// ops/attend.cpp on CUDA: the same cases.
#include "attend.cpp"
