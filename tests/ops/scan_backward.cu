// ops/scan_backward.cpp on CUDA: the same cases.
#include "scan_backward.cpp"
