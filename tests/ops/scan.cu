// ops/scan.cpp on CUDA: the same cases.
#include "scan.cpp"
