// model/golden.cpp on CUDA: the same cases.
#include "golden.cpp"
